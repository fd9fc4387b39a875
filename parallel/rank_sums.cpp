// Works through blocks that stay in the first-level cache: each buffer is read from memory once and
// the result is written once, however many buffers there are.
#include "parallel/rank_sums.h"

#include <algorithm>
#include <bit>
#include <string>
#include <type_traits>

namespace dstrain {
namespace {

constexpr int64_t kBlock = 1024;  // elements; accumulators of 8 KiB at most

struct Bf16 {
  uint16_t bits;
};

float widen(Bf16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}

Bf16 round_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x40;  // rounding could carry a NaN into infinity
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded)};
}

// Element type -> type that adds. Integers add without a sign, where wrapping around is defined.
template <class T>
struct Adder {
  using Type = T;
};
template <>
struct Adder<Bf16> {
  using Type = float;
};
template <>
struct Adder<int32_t> {
  using Type = uint32_t;
};
template <>
struct Adder<int64_t> {
  using Type = uint64_t;
};

template <class Acc, class T>
Acc load(T x) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return widen(x);
  } else {
    return static_cast<Acc>(x);
  }
}

template <class T, class Acc>
T store(Acc x) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return round_to_bf16(x);
  } else {
    return static_cast<T>(x);
  }
}

template <class T, class Acc, class Combine>
void reduce_typed(std::span<const void* const> buffers, int64_t count, void* out,
                  const Combine& combine) {
  Acc acc[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = std::min(kBlock, count - begin);
    const T* const first = static_cast<const T*>(buffers[0]) + begin;
    for (int64_t i = 0; i < n; ++i) acc[i] = load<Acc>(first[i]);
    for (const void* const buffer : buffers.subspan(1)) {
      const T* const x = static_cast<const T*>(buffer) + begin;
      for (int64_t i = 0; i < n; ++i) acc[i] = combine(acc[i], load<Acc>(x[i]));
    }
    T* const result = static_cast<T*>(out) + begin;
    for (int64_t i = 0; i < n; ++i) result[i] = store<T>(acc[i]);
  }
}

template <class T>
void sum_typed(std::span<const void* const> buffers, int64_t count, void* out) {
  using Acc = typename Adder<T>::Type;
  reduce_typed<T, Acc>(buffers, count, out, [](Acc a, Acc b) { return a + b; });
}

// The comparison is false for a NaN in `a`, which therefore stays; b != b lets one in `b` through.
template <class T>
void max_typed(std::span<const void* const> buffers, int64_t count, void* out) {
  reduce_typed<T, T>(buffers, count, out, [](T a, T b) { return b > a || b != b ? b : a; });
}

[[noreturn]] void refuse(const char* what, DType dtype) {
  check_failed("a type that can be reduced", __FILE__, __LINE__,
               std::string(what) + " over ranks do not take " + dtype_name(dtype));
}

}  // namespace

void reduce_in_order(Reduction reduction, DType dtype, std::span<const void* const> buffers,
                     int64_t count, void* out) {
  DSTRAIN_CHECK(!buffers.empty(), "a reduction needs at least one buffer");
  if (reduction == Reduction::sum) {
    switch (dtype) {
      case DType::f32:
        return sum_typed<float>(buffers, count, out);
      case DType::f64:
        return sum_typed<double>(buffers, count, out);
      case DType::i32:
        return sum_typed<int32_t>(buffers, count, out);
      case DType::i64:
        return sum_typed<int64_t>(buffers, count, out);
      case DType::bf16:
        return sum_typed<Bf16>(buffers, count, out);
      default:
        refuse("sums", dtype);
    }
  }
  switch (dtype) {
    case DType::f32:
      return max_typed<float>(buffers, count, out);
    case DType::f64:
      return max_typed<double>(buffers, count, out);
    case DType::i64:
      return max_typed<int64_t>(buffers, count, out);
    default:
      refuse("maxima", dtype);
  }
}

}  // namespace dstrain
