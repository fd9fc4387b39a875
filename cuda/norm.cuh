// What the kernels of the norms share.
#pragma once

#include "cuda/kernel.cuh"

namespace dstrain {

// A row's threads are blockDim.x, whole warps. Where that is one warp, a block has blockDim.y rows.
inline constexpr int kMostNormThreads = 512;  // of a row that is moved once, in vectors
inline constexpr int kNormLoopThreads = 256;  // of a row that is read twice, in elements

// The sum of x over the threads of a row, in each of them. One barrier, so `shared`, of 32 values,
// may be used again only after another one.
__device__ __forceinline__ float row_sum(float x, float* shared) {
  x = warp_sum(x);
  if (blockDim.x == 32) return x;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.0f);
}

// Whether x, a matrix or one row, can be read in vectors of 16 bytes; an absent one is not read.
template <class F>
bool rows_fit_vectors(const Tensor& x) {
  if (!x.defined()) return true;
  const int64_t columns = x.size(x.dims() - 1);
  return fits_vectors<F>(x.raw(), columns, x.dims() == 1 ? columns : x.row_stride());
}

}  // namespace dstrain
