// Rotary position embedding: a pair (a, b) at position p becomes (a cos - b sin, a sin + b cos), in
// f32; backward turns the other way. What the kernels around it share: pairs in memory, the table,
// and blocks of 256 threads that have one token or several.
#pragma once

#include <algorithm>
#include <string>

#include "core/backend/expect.h"
#include "core/backend/ops.h"
#include "cuda/pack.cuh"
#include "cuda/rows.cuh"

namespace dstrain {

constexpr int kRotaryThreads = 256;

// What a thread moves at once: 16 bytes of a head, or one element where rows are not aligned to
// that.
template <class F, bool kVectors>
struct Unit {
  static constexpr int kSize = kVectors ? kVector<F> : 1;
  static constexpr int kPairs = kVectors ? kSize / 2 : 1;
};

// Neighbouring pairs of a rotated part.
template <class F, int kPairs>
struct Pairs {
  float a[kPairs], b[kPairs];

  // `head` is the rotated part, `pair` the first of the pairs, `half` the number of all.
  __device__ __forceinline__ static Pairs load(const F* head, unsigned pair, unsigned half,
                                               bool interleaved) {
    Pairs out;
    if (!interleaved || kPairs == 1) {
      using P = Pack<F, kPairs>;
      const P a = P::load(head + (interleaved ? 2 * pair : pair));
      const P b = P::load(head + (interleaved ? 2 * pair + 1 : pair + half));
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        out.a[i] = to_float(a.at[i]);
        out.b[i] = to_float(b.at[i]);
      }
    } else {
      const auto both = Pack<F, 2 * kPairs>::load(head + 2 * pair);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        out.a[i] = to_float(both.at[2 * i]);
        out.b[i] = to_float(both.at[2 * i + 1]);
      }
    }
    return out;
  }
  __device__ __forceinline__ void store(F* head, unsigned pair, unsigned half,
                                        bool interleaved) const {
    if (!interleaved || kPairs == 1) {
      Pack<F, kPairs> low, high;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        low.at[i] = from_float<F>(a[i]);
        high.at[i] = from_float<F>(b[i]);
      }
      low.store(head + (interleaved ? 2 * pair : pair));
      high.store(head + (interleaved ? 2 * pair + 1 : pair + half));
    } else {
      Pack<F, 2 * kPairs> both;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        both.at[2 * i] = from_float<F>(a[i]);
        both.at[2 * i + 1] = from_float<F>(b[i]);
      }
      both.store(head + 2 * pair);
    }
  }
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

  __device__ __forceinline__ int position(int64_t t) const {
    return checked_index(positions[t], table_rows);
  }
  template <class F, int kPairs>
  __device__ __forceinline__ void turn(int position, unsigned pair, Pairs<F, kPairs>& x) const {
    const auto c = Pack<float, kPairs>::load(cos + position * cos_stride + pair);
    const auto s = Pack<float, kPairs>::load(sin + position * sin_stride + pair);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = x.a[i], b = x.b[i], turned = sign * s.at[i];
      x.a[i] = a * c.at[i] - b * turned;
      x.b[i] = a * turned + b * c.at[i];
    }
  }
  template <class F, int kPairs>
  __device__ __forceinline__ void turn(const F* from, F* to, int position, unsigned pair) const {
    auto x = Pairs<F, kPairs>::load(from, pair, half, interleaved);
    turn(position, pair, x);
    x.store(to, pair, half, interleaved);
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
  return 2 * pairs % kVector<F> == 0 &&
         fits_vectors<float>(rope.cos_PR.raw(), pairs, rope.cos_PR.row_stride()) &&
         fits_vectors<float>(rope.sin_PR.raw(), pairs, rope.sin_PR.row_stride());
}

// Blocks of 256 threads: as many threads for a token as leave each about two moves of its `moves`.
struct TokenGrid {
  dim3 block, grid;

  TokenGrid(int64_t tokens, int64_t moves) {
    unsigned threads = 32;
    while (threads < kRotaryThreads && 2 * threads < moves) threads *= 2;
    block = dim3(threads, kRotaryThreads / threads);
    grid = dim3(static_cast<unsigned>(ceil_div(tokens, block.y)));
  }
};

// Calls launch.operator()<kVectors>(elements of a move).
template <class F, class Launch>
void dispatch_vectors(bool vectors, const Launch& launch) {
  if (vectors)
    launch.template operator()<true>(kVector<F>);
  else
    launch.template operator()<false>(1);
}

}  // namespace dstrain
