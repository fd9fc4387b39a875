// Rotary position embedding: a pair (a, b) at position p becomes (a cos - b sin, a sin + b cos), in
// f32; backward turns the other way. What the kernels around it share: pairs in memory and the
// table.
#pragma once

#include <string>

#include "core/backend/expect.h"
#include "core/backend/ops.h"
#include "cuda/pack.cuh"
#include "cuda/rows.cuh"

namespace dstrain {

// What a thread moves at once of a rotated part of 2 * half elements: two packs, half a part apart,
// which are whole pairs whether a pair's elements are neighbours or half a part apart. Where they
// are neighbours and packs have one element, the second pack is the next element instead.
template <class F, int kSize>
struct Pairs {
  Pack<F, kSize> low, high;

  __device__ __forceinline__ static unsigned first(unsigned column, bool interleaved) {
    return kSize == 1 && interleaved ? 2 * column : column * kSize;
  }
  __device__ __forceinline__ static unsigned second(unsigned column, unsigned half,
                                                    bool interleaved) {
    return kSize == 1 && interleaved ? 2 * column + 1 : half + column * kSize;
  }
  // `column` counts the first packs of a part: half / kSize of them.
  __device__ __forceinline__ static Pairs load(const F* part, unsigned column, unsigned half,
                                               bool interleaved) {
    return {Pack<F, kSize>::load(part + first(column, interleaved)),
            Pack<F, kSize>::load(part + second(column, half, interleaved))};
  }
  __device__ __forceinline__ void store(F* part, unsigned column, unsigned half,
                                        bool interleaved) const {
    low.store(part + first(column, interleaved));
    high.store(part + second(column, half, interleaved));
  }
};

// The cosines and sines of the pairs of one column, in the order of the pairs.
template <int kSize>
struct Angles {
  Pack<float, kSize> cos, sin;
};

struct Rotation {
  const float* cos;
  const float* sin;
  const int32_t* positions;
  int64_t cos_stride, sin_stride;
  int table_rows;
  unsigned half;  // pairs of a rotated part
  bool interleaved;
  float sign;  // 1 turns forward, -1 back

  // Of a position as it stands in memory, so that what does not depend on it can be loaded first.
  template <int kSize>
  __device__ __forceinline__ Angles<kSize> angles(int32_t position, unsigned column) const {
    const int64_t row = checked_index(position, table_rows);
    return {load_row<kSize>(cos + row * cos_stride, column),
            load_row<kSize>(sin + row * sin_stride, column)};
  }
  // Which products are fused is written out, so that it is the same in all kernels.
  __device__ __forceinline__ void turn(float& a, float& b, float cosine, float sine) const {
    const float x = a, y = b, turned = sign * sine;
    a = fmaf(x, cosine, -(y * turned));
    b = fmaf(x, turned, y * cosine);
  }
  template <class F, int kSize>
  __device__ __forceinline__ void turn(const Angles<kSize>& angles, Pairs<F, kSize>& x) const {
    if (kSize == 1 || !interleaved) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) turn(x.low.at[i], x.high.at[i], angles, i);
    } else {
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) {
        turn(x.low.at[2 * i], x.low.at[2 * i + 1], angles, i);
        turn(x.high.at[2 * i], x.high.at[2 * i + 1], angles, kSize / 2 + i);
      }
    }
  }

 private:
  template <class F, int kSize>
  __device__ __forceinline__ void turn(F& a, F& b, const Angles<kSize>& angles, int i) const {
    float x = to_float(a), y = to_float(b);
    turn(x, y, angles.cos.at[i], angles.sin.at[i]);
    a = from_float<F>(x);
    b = from_float<F>(y);
  }
  template <int kSize>
  __device__ __forceinline__ Pack<float, kSize> load_row(const float* row, unsigned column) const {
    if (kSize == 1 || !interleaved) return Pack<float, kSize>::load(row + column * kSize);
    constexpr int kHalf = kSize == 1 ? 1 : kSize / 2;
    const auto low = Pack<float, kHalf>::load(row + column * kHalf);
    const auto high = Pack<float, kHalf>::load(row + half / 2 + column * kHalf);
    Pack<float, kSize> out;
#pragma unroll
    for (int i = 0; i < kSize; ++i) out.at[i] = i < kHalf ? low.at[i] : high.at[i - kHalf];
    return out;
  }
};

inline void expect_rope(const RopeTable& rope, const Tensor& positions_T, int64_t T,
                        int64_t head_width) {
  DSTRAIN_CHECK(rope.cos_PR.dims() == 2 && 2 * rope.cos_PR.size(1) <= head_width,
                "the rotary table " + rope.cos_PR.describe() + " is wider than a head of " +
                    std::to_string(head_width));
  const int64_t positions = rope.cos_PR.size(0), pairs = rope.cos_PR.size(1);
  expect_strided(rope.cos_PR, "rope: cos_PR", DType::f32, {positions, pairs});
  expect_strided(rope.sin_PR, "rope: sin_PR", DType::f32, {positions, pairs});
  expect(positions_T, "rope: positions_T", DType::i32, {T});
}

inline Rotation rotation(const RopeTable& rope, const Tensor& positions_T, float sign) {
  return {.cos = pointer<float>(rope.cos_PR),
          .sin = pointer<float>(rope.sin_PR),
          .positions = pointer<int32_t>(positions_T),
          .cos_stride = rope.cos_PR.row_stride(),
          .sin_stride = rope.sin_PR.row_stride(),
          .table_rows = static_cast<int>(rope.cos_PR.size(0)),
          .half = static_cast<unsigned>(rope.cos_PR.size(1)),
          .interleaved = rope.interleaved,
          .sign = sign};
}

// Heads of `width` elements lie at multiples of 16 bytes.
template <class F>
bool heads_fit(const Tensor& x, int64_t width) {
  return !x.defined() || fits_vectors<F>(x.raw(), width, x.row_stride());
}
template <class F>
bool table_fits(const RopeTable& rope) {
  const int64_t pairs = rope.cos_PR.size(1);
  return pairs % kVector<F> == 0 &&
         fits_vectors<float>(rope.cos_PR.raw(), pairs, rope.cos_PR.row_stride()) &&
         fits_vectors<float>(rope.sin_PR.raw(), pairs, rope.sin_PR.row_stride());
}

// Calls launch.operator()<elements of a pack>().
template <class F, class Launch>
void dispatch_packs(bool vectors, const Launch& launch) {
  if (vectors)
    launch.template operator()<kVector<F>>();
  else
    launch.template operator()<1>();
}

}  // namespace dstrain
