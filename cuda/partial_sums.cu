// out[d] (+)= sum_p partial[p, d]. P parts, D columns, f32. A block has 32 columns; its warps take
// every 32nd part, and their sums are added in the order of the warps.
#include "cuda/partial_sums.h"

#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr int kLanes = 32;

__global__ void __launch_bounds__(kLanes* kLanes)
    sum_parts_kernel(const float* __restrict__ partial_PD, int64_t parts, int64_t columns, bool add,
                     float* __restrict__ out_D) {
  __shared__ float sums[kLanes][kLanes];
  const int64_t d = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  float sum = 0;
  if (d < columns) {
#pragma unroll 8
    for (int64_t p = threadIdx.y; p < parts; p += kLanes) sum += partial_PD[p * columns + d];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || d >= columns) return;
#pragma unroll
  for (int i = 1; i < kLanes; ++i) sum += sums[i][threadIdx.x];
  out_D[d] = add ? out_D[d] + sum : sum;
}

}  // namespace

void sum_parts(Stream& stream, const float* partial_PD, int64_t parts, int64_t columns,
               Accumulate accumulate, float* out_D) {
  if (columns == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(columns, kLanes));
  sum_parts_kernel<<<blocks, dim3(kLanes, kLanes), 0, cuda(stream)>>>(
      partial_PD, parts, columns, accumulate == Accumulate::add, out_D);
  check_launch("sum_parts");
}

}  // namespace dstrain
