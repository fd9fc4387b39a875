// The last step of a sum in f64 whose parts have been summed by blocks.
#pragma once

#include "cuda/cuda_check.h"
#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

// One block.
__global__ void __launch_bounds__(1024) add_partials_kernel(const double* partials, int64_t count, double* sum_1) {
  __shared__ double shared[32];
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += 1024) sum += partials[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) *sum_1 += sum;
}

// sum_1 += partials, in an order that depends on their count only. Asynchronous.
void add_partials(cudaStream_t stream, const double* partials, int64_t count, double* sum_1, const char* op) {
  add_partials_kernel<<<1, 1024, 0, stream>>>(partials, count, sum_1);
  check_launch(op);
}

}  // namespace
}  // namespace dstrain
