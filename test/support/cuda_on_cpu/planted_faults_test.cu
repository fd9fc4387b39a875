// Faults that running kernels on the CPU must notice.
#include "cuda/kernel.cuh"
#include "cuda/warp_instructions.cuh"
#include "test/support/catch.h"

namespace dstrain::test {
namespace {

// Each thread takes what its neighbour wrote.
template <bool kBarrier>
__global__ void rotate_kernel(int* to) {
  __shared__ int values[128];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  to[threadIdx.x] = values[(threadIdx.x + 1) % 128];
}
template <bool kWait>
__global__ void copy_kernel(const float* from, float* to) {
  __shared__ alignas(16) float row[4];
  copy_async(row, from, false);
  commit_copies();
  if (kWait) wait_for_copies<0>();
  for (int i = 0; i < 4; ++i) to[i] = row[i];
}
__global__ void split_kernel() {
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncwarp();
}

template <bool kBarrier>
int wrong() {
  int to[128], count = 0;
  rotate_kernel<kBarrier><<<1, 128, 0, nullptr>>>(to);
  for (int i = 0; i < 128; ++i) count += to[i] != (i + 1) % 128;
  return count;
}
}  // namespace

TEST_CASE("cuda on cpu: a missing barrier shows", "[cuda_on_cpu]") {
  CHECK(wrong<true>() == 0);
  CHECK(wrong<false>() > 20);
}

TEST_CASE("cuda on cpu: a missing wait shows", "[cuda_on_cpu]") {
  alignas(16) float from[4] = {1, 2, 3, 4};
  float to[4];
  copy_kernel<true><<<1, 1, 0, nullptr>>>(from, to);
  CHECK(to[3] == 4);
  copy_kernel<false><<<1, 1, 0, nullptr>>>(from, to);
  CHECK(to[3] != to[3]);
}

TEST_CASE("cuda on cpu: lanes that do not meet fail the launch", "[cuda_on_cpu]") {
  split_kernel<<<1, 64, 0, nullptr>>>();
  CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
  cuda_on_cpu::launch_error() = cudaSuccess;
}

}  // namespace dstrain::test
