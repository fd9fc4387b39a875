// What kernels share: element types, vectors of 16 bytes, sums over warps and blocks, launch
// shapes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "core/base/error.h"
#include "core/tensor/tensor.h"
#include "cuda/cuda_check.h"
#include "cuda/cuda_device.h"

namespace dstrain {

using bf16 = __nv_bfloat16;

// Calls f.template operator()<F>() with float or bf16.
template <class Function>
void dispatch_f(DType dtype, const char* op, const Function& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::bf16:
      return f.template operator()<bf16>();
    default:
      DSTRAIN_CHECK(false, std::string(op) +
                               ": the CUDA back end computes in f32 and bf16, not in " +
                               dtype_name(dtype));
  }
}

// The same with F or S, which is float, as `dtype` says.
template <class F, class Function>
void dispatch_f_or_s(DType dtype, const char* op, const Function& f) {
  dispatch_f(dtype, op, [&]<class E>() {
    if constexpr (std::is_same_v<E, F> || std::is_same_v<E, float>)
      f.template operator()<E>();
    else
      DSTRAIN_CHECK(false, std::string(op) + ": element types differ");
  });
}

template <class F>
F* pointer(const Tensor& x) {
  return static_cast<F*>(x.raw());  // null where absent
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
  return __bfloat162float(x);
}
template <class F>
__device__ __forceinline__ F from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16(x);
}

// 16 bytes of F in registers; memory must be aligned to them.
template <class F>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(F);
  F at[kSize];

  __device__ __forceinline__ static Vec load(const F* from) {
    Vec out;
    *reinterpret_cast<uint4*>(out.at) = *reinterpret_cast<const uint4*>(from);
    return out;
  }
  // Read once: not kept in the first-level cache.
  __device__ __forceinline__ static Vec stream(const F* from) {
    Vec out;
    *reinterpret_cast<uint4*>(out.at) = __ldcs(reinterpret_cast<const uint4*>(from));
    return out;
  }
  __device__ __forceinline__ void store(F* to) const {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(at);
  }
};

// Whether rows of n elements, row_stride apart, can be read in vectors of 16 bytes.
template <class F>
bool fits_vectors(const void* data, int64_t n, int64_t row_stride) {
  constexpr int64_t kSize = 16 / sizeof(F);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && n % kSize == 0 && row_stride % kSize == 0;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// The sum over a block of whole warps, in every thread; the order depends on the block's size only.
// `shared` holds 32 values and may be used again after the next barrier.
template <class S>
__device__ __forceinline__ S block_sum(S x, S* shared) {
  x = warp_sum(x);
  const int warps = blockDim.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  S sum = threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : S(0);
  return warp_sum(sum);
}
__device__ __forceinline__ float block_max(float x, float* shared) {
  x = warp_max(x);
  const int warps = blockDim.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_max(threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : -INFINITY);
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Blocks for a grid-stride loop over n items of which a block takes `per_block` at a time.
inline unsigned grid_for(int64_t n, int64_t per_block, int num_sms, int blocks_per_sm) {
  return static_cast<unsigned>(std::max<int64_t>(
      1, std::min<int64_t>(ceil_div(n, per_block), int64_t{num_sms} * blocks_per_sm)));
}

}  // namespace dstrain
