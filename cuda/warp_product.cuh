// Matrix products of one warp, whose operands lie in shared memory or in the warp's registers: in
// bf16 on the tensor cores, in f32 with f32 arithmetic. Sums are f32.
//
// A result of 16 rows and 8 kN columns is float[kN][4]: with g = lane / 4 and t = lane % 4, lane
// holds of each 8 columns the elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#pragma once

#include "cuda/kernel.cuh"
#include "cuda/warp_instructions.cuh"

namespace dstrain {

// Elements that are added to the rows of a matrix in shared memory, whose length is a multiple of
// 16, so that the rows of a column of 16-byte words fall into different banks.
template <class F>
inline constexpr int kRowPadding = static_cast<int>(16 / sizeof(F));

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// c[m][n] += sum over k of a[m][k] b[n][k]. `depth` is a multiple of 16; rows are aligned to 16
// bytes.
template <int kN>
__device__ __forceinline__ void add_product_nt(float (&c)[kN][4], const bf16* a, int a_stride,
                                               const bf16* b, int b_stride, int depth) {
  static_assert(kN % 2 == 0);
  const int lane = threadIdx.x % 32;
  a += lane % 16 * a_stride + lane / 16 * 8;
  b += (lane / 16 * 8 + lane % 8) * b_stride + lane / 8 % 2 * 8;
#pragma unroll 2
  for (int k = 0; k < depth; k += 16) {
    uint32_t a_words[4];
    load_matrices(a_words, a + k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b_words[4];
      load_matrices(b_words, b + n * 8 * b_stride + k);
      multiply_add(c[n], a_words, b_words[0], b_words[1]);
      multiply_add(c[n + 1], a_words, b_words[2], b_words[3]);
    }
  }
}

template <int kN>
__device__ __forceinline__ void add_product_nt(float (&c)[kN][4], const float* a, int a_stride,
                                               const float* b, int b_stride, int depth) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  a += g * a_stride;
  b += 2 * t * b_stride;
  const auto dot = [](float sum, const float4& x, const float4& y) {
    return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
  };
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {
    const float4 low = *reinterpret_cast<const float4*>(a + k);
    const float4 high = *reinterpret_cast<const float4*>(a + 8 * a_stride + k);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float4 even = *reinterpret_cast<const float4*>(b + 8 * n * b_stride + k);
      const float4 odd = *reinterpret_cast<const float4*>(b + (8 * n + 1) * b_stride + k);
      c[n][0] = dot(c[n][0], low, even);
      c[n][1] = dot(c[n][1], low, odd);
      c[n][2] = dot(c[n][2], high, even);
      c[n][3] = dot(c[n][3], high, odd);
    }
  }
}

// c[m][n] += sum over k of p[m][k] b[k][n], where p is a result as above: 8 kP values of k. p is
// rounded to bf16 first where b is bf16. Rows of b are aligned to 16 bytes.
template <int kP, int kN>
__device__ __forceinline__ void add_product_nn(float (&c)[kN][4], const float (&p)[kP][4],
                                               const bf16* b, int b_stride) {
  static_assert(kP % 2 == 0 && kN % 2 == 0);
  const int lane = threadIdx.x % 32;
  b += lane % 16 * b_stride + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kP; k += 2) {
    const uint32_t words[4] = {bf16_pair(p[k][0], p[k][1]), bf16_pair(p[k][2], p[k][3]),
                               bf16_pair(p[k + 1][0], p[k + 1][1]),
                               bf16_pair(p[k + 1][2], p[k + 1][3])};
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b_words[4];
      load_matrices_trans(b_words, b + k * 8 * b_stride + n * 8);
      multiply_add(c[n], words, b_words[0], b_words[1]);
      multiply_add(c[n + 1], words, b_words[2], b_words[3]);
    }
  }
}

template <int kP, int kN>
__device__ __forceinline__ void add_product_nn(float (&c)[kN][4], const float (&p)[kP][4],
                                               const float* b, int b_stride) {
  const int lane = threadIdx.x % 32;
  b += 2 * (lane % 4);
#pragma unroll
  for (int k = 0; k < kP; ++k) {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const int source = lane / 4 * 4 + i / 2;  // holds columns i and i ^ 1 of these rows
      const float low = __shfl_sync(0xffffffffu, i % 2 ? p[k][1] : p[k][0], source);
      const float high = __shfl_sync(0xffffffffu, i % 2 ? p[k][3] : p[k][2], source);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float2 two = *reinterpret_cast<const float2*>(b + (8 * k + i) * b_stride + 8 * n);
        c[n][0] = fmaf(low, two.x, c[n][0]);
        c[n][1] = fmaf(low, two.y, c[n][1]);
        c[n][2] = fmaf(high, two.x, c[n][2]);
        c[n][3] = fmaf(high, two.y, c[n][3]);
      }
    }
  }
}

}  // namespace dstrain
