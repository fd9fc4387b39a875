// What the Hopper kernels of grouped products read from device memory, and their entry points. A
// kernel computes D = A B per group; D is M x N, K is summed over.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/grouped_gemm.h"

namespace dstrain {

// Arrays of one entry per group. A stride is the distance of two rows as they lie in memory.
struct GroupedGemmArrays {
  struct Shape {
    int32_t m, n, k;
  };
  Shape* shapes;
  const void **a, **b;
  void** d;
  int64_t *a_strides, *b_strides, *d_strides;
  void* workspace;  // aligned to 256 bytes
};

// Five tensor maps of 128 bytes per multiprocessor: A, B, what D is added to, and D of two warp
// groups.
inline int64_t grouped_gemm_workspace_bytes(int num_sms) {
  return int64_t{5} * 128 * num_sms + 1024;
}

// Each product's kernels: prepare() once per process; run() queues one of them.
void prepare_grouped_forward();
void run_grouped_forward(cudaStream_t stream, GroupedTiling tiling, const GroupedGemmArrays& arrays,
                         int groups, int num_sms);
void prepare_grouped_backward_input();
void run_grouped_backward_input(cudaStream_t stream, GroupedTiling tiling,
                                const GroupedGemmArrays& arrays, int groups, int num_sms);

}  // namespace dstrain
