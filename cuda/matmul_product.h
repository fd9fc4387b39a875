// A matrix product as the CUDA back end sees it, and the key that stands for all products alike. No
// CUDA here.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/backend/ops.h"

namespace dstrain {

// A matrix in device memory, its rows `stride` elements apart.
struct MatrixRef {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
};

// c[m,n] = alpha * op(a) op(b) + beta * c, with op(a) [m,k] and op(b) [k,n].
struct Product {
  Trans ta = Trans::no, tb = Trans::no;
  int64_t m = 0, n = 0, k = 0;
  float alpha = 1, beta = 0;
  MatrixRef a, b, c;
};

// How memory holds an operand: (rows, columns) of a and b before they are transposed.
inline int64_t rows_of_a(const Product& p) {
  return p.ta == Trans::no ? p.m : p.k;
}
inline int64_t columns_of_a(const Product& p) {
  return p.ta == Trans::no ? p.k : p.m;
}
inline int64_t rows_of_b(const Product& p) {
  return p.tb == Trans::no ? p.k : p.n;
}
inline int64_t columns_of_b(const Product& p) {
  return p.tb == Trans::no ? p.n : p.k;
}

// The largest power of two, 256 at most, that every row's address is a multiple of. Beyond 16,
// which is what the widest accesses ask of every row, only the first row counts: more than that is
// only ever asked of a base address.
inline uint16_t row_alignment(const MatrixRef& x) {
  auto power_of_two_in = [](uint64_t bytes) {
    return uint64_t{1} << std::countr_zero(bytes | 256);
  };
  const uint64_t first = power_of_two_in(reinterpret_cast<uintptr_t>(x.data));
  const uint64_t step = power_of_two_in(static_cast<uint64_t>(x.stride * dtype_bytes(x.dtype)));
  return static_cast<uint16_t>(step < 16 && step < first ? step : first);
}

// Products with equal keys may use the same algorithm.
struct MatmulKey {
  int64_t m = 0, n = 0, k = 0;
  int64_t stride_a = 0, stride_b = 0, stride_c = 0;
  DType operands = DType::f32, result = DType::f32;
  bool transposed_a = false, transposed_b = false;
  bool adds = false;  // beta is not 0: c is read
  bool tf32 = false;
  uint16_t alignment_a = 0, alignment_b = 0, alignment_c = 0;

  bool operator==(const MatmulKey&) const = default;
};

// a and b have one type.
inline MatmulKey key_of(const Product& p, bool tf32) {
  return {.m = p.m,
          .n = p.n,
          .k = p.k,
          .stride_a = p.a.stride,
          .stride_b = p.b.stride,
          .stride_c = p.c.stride,
          .operands = p.a.dtype,
          .result = p.c.dtype,
          .transposed_a = p.ta == Trans::yes,
          .transposed_b = p.tb == Trans::yes,
          .adds = p.beta != 0,
          .tf32 = tf32 && p.a.dtype == DType::f32,
          .alignment_a = row_alignment(p.a),
          .alignment_b = row_alignment(p.b),
          .alignment_c = row_alignment(p.c)};
}

struct MatmulKeyHash {
  size_t operator()(const MatmulKey& key) const {
    const uint64_t flags =
        static_cast<uint64_t>(key.operands) | static_cast<uint64_t>(key.result) << 8 |
        uint64_t{key.transposed_a} << 16 | uint64_t{key.transposed_b} << 17 |
        uint64_t{key.adds} << 18 | uint64_t{key.tf32} << 19 | uint64_t{key.alignment_a} << 20 |
        uint64_t{key.alignment_b} << 32 | uint64_t{key.alignment_c} << 44;
    uint64_t hash = flags;
    for (const int64_t part : {key.m, key.n, key.k, key.stride_a, key.stride_b, key.stride_c}) {
      hash = (hash ^ static_cast<uint64_t>(part)) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 29;
    }
    return static_cast<size_t>(hash);
  }
};

// "bf16 nt 16384x2048x1408 +f32": operands, which of them are transposed, m x n x k, the result and
// whether it is added to.
std::string shape_text(const MatmulKey& key);
// The whole key, without spaces.
std::string key_text(const MatmulKey& key);

}  // namespace dstrain
