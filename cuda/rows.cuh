// Matrices as kernels see them, and indices that may be wrong: a routing can come from a recording.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/tensor/tensor.h"

namespace dstrain {

// A matrix whose rows may be strided; data is null where the tensor is absent.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  __device__ __forceinline__ T* operator[](int64_t row) const { return data + row * stride; }
};

template <class T>
Rows<T> rows_of(const Tensor& x) {
  return {static_cast<T*>(x.raw()), x.defined() ? x.row_stride() : 0};
}

// Ends the kernel, and with it the process's use of the GPU, where the CPU throws: the next call that waits
// reports it, and no memory elsewhere is touched.
__device__ __forceinline__ int32_t checked_index(int32_t index, int32_t size) {
  if (static_cast<uint32_t>(index) >= static_cast<uint32_t>(size)) __trap();
  return index;
}
// Below 0 stands for none.
__device__ __forceinline__ int32_t checked_or_none(int32_t index, int32_t size) {
  if (index >= size) __trap();
  return index;
}
// Of several at once, none among them: one branch, so that what is loaded from there can be under way together.
template <int kCount>
__device__ __forceinline__ void check_indices(const int32_t (&indices)[kCount], int32_t size) {
  bool good = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) good &= indices[i] < size;
  if (!good) __trap();
}

}  // namespace dstrain
