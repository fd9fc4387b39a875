// The k-th largest of 31-bit magnitudes is found in two digits of 16 and 15 bits, each bit by bit:
// a bit is set if at least k numbers are that large. Counting takes few instructions per vector
// register of 16-bit numbers; 16 rounds of it cost less than a histogram, whose additions to one
// place wait for each other, or a partial sort, whose branches nobody can predict.
#include "core/backend/cpu_topk.h"

#include <algorithm>
#include <bit>
#include <numeric>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace dstrain {
namespace {

constexpr int64_t kGroup = 64;  // elements that loops take at once
constexpr int kUpperBits = 16, kLowerBits = 15;

int64_t whole_groups(int64_t n) {
  return (n + kGroup - 1) / kGroup * kGroup;
}

uint32_t magnitude_of(float value) {
  return std::bit_cast<uint32_t>(value) & 0x7fffffffu;
}
uint16_t upper_digit(float value) {
  return static_cast<uint16_t>(magnitude_of(value) >> kLowerBits);
}
uint16_t lower_digit(float value) {
  return static_cast<uint16_t>(magnitude_of(value) & ((1u << kLowerBits) - 1));
}

// `least` is above 0, and zeros follow the n keys up to a whole group.
int64_t count_at_least(const uint16_t* keys, int64_t n, uint16_t least) {
  uint16_t counts[kGroup] = {};  // at most 1024 groups
  for (int64_t i = 0; i < n; i += kGroup) {
#pragma omp simd
    for (int64_t j = 0; j < kGroup; ++j)
      counts[j] = static_cast<uint16_t>(counts[j] + (keys[i + j] >= least ? 1 : 0));
  }
  return std::accumulate(counts, counts + kGroup, int64_t{0});
}

struct Digit {
  uint16_t value = 0;
  int64_t larger = 0, equal = 0;  // keys above it, keys that equal it
};

// The k-th largest of n keys below 2^bits. Overwrites what follows them up to a whole group.
Digit kth_largest(uint16_t* keys, int64_t n, int64_t k, int bits) {
  std::fill(keys + n, keys + whole_groups(n), uint16_t{0});
  uint16_t value = 0;
  int64_t at_least = n, larger = 0;
  for (int bit = bits - 1; bit >= 0; --bit) {
    const auto trial = static_cast<uint16_t>(value | 1u << bit);
    const int64_t count = count_at_least(keys, n, trial);
    if (count >= k) {
      value = trial;
      at_least = count;
    } else {
      larger = count;  // the last trial that fails is value + 1
    }
  }
  return {value, larger, at_least - larger};
}

// Bit i says whether flag i, 0 or 255, is set.
uint64_t bits_of(const uint8_t* flags) {
  uint64_t bits = 0;
#ifdef __SSE2__
  for (int64_t i = 0; i < kGroup; i += 16) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(flags + i));
    bits |= uint64_t{static_cast<uint32_t>(_mm_movemask_epi8(sixteen))} << i;
  }
#else
  for (int64_t i = 0; i < kGroup; ++i) bits |= uint64_t{flags[i] & 1u} << i;
#endif
  return bits;
}

// Bit i says whether matches(begin + i).
template <class Matches>
uint64_t match_group(int64_t begin, int64_t count, const Matches& matches) {
  uint8_t flags[kGroup] = {};
  if (count >= kGroup) {
#pragma omp simd
    for (int64_t i = 0; i < kGroup; ++i) flags[i] = matches(begin + i) ? 255 : 0;
  } else {
    for (int64_t i = 0; i < count; ++i) flags[i] = matches(begin + i) ? 255 : 0;
  }
  return bits_of(flags);
}

// The first `wanted` of the i below n that match, of which there are as many.
template <class Matches>
void find_first(int64_t n, int64_t wanted, uint16_t* indices, const Matches& matches) {
  int64_t found = 0;
  for (int64_t begin = 0; found < wanted; begin += kGroup) {
    uint64_t bits = match_group(begin, n - begin, matches);
    for (; bits != 0 && found < wanted; bits &= bits - 1)
      indices[found++] = static_cast<uint16_t>(begin + std::countr_zero(bits));
  }
}

// Of the elements whose upper digit is the given one, the lower digits take the place of the upper
// ones in `keys`. Where there are many of them the other elements remain, as zeros. Returns the
// number of keys.
int64_t lower_digits_of(const float* v, int64_t n, const Digit& upper, uint16_t* keys,
                        uint16_t* indices) {
  if (upper.equal <= n / 8) {
    find_first(n, upper.equal, indices, [&](int64_t i) { return keys[i] == upper.value; });
    for (int64_t j = 0; j < upper.equal; ++j) keys[j] = lower_digit(v[indices[j]]);
    return upper.equal;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    keys[i] = keys[i] == upper.value ? lower_digit(v[i]) : uint16_t{0};
  return n;
}

}  // namespace

int64_t topk_scratch_bytes(int64_t block) {
  return 3 * whole_groups(block) * static_cast<int64_t>(sizeof(uint16_t));
}

void choose_topk(const float* v, int64_t n, int64_t k, void* scratch, uint16_t* indices) {
  if (k == n) {
    std::iota(indices, indices + n, uint16_t{0});
    return;
  }
  uint16_t* const keys = static_cast<uint16_t*>(scratch);
  uint16_t* const larger_ones = keys + whole_groups(n);
  uint16_t* const equal_ones = larger_ones + whole_groups(n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) keys[i] = upper_digit(v[i]);
  const Digit upper = kth_largest(keys, n, k, kUpperBits);
  const int64_t undecided = lower_digits_of(v, n, upper, keys, larger_ones);
  const Digit lower = kth_largest(keys, undecided, k - upper.larger, kLowerBits);

  const uint32_t threshold = uint32_t{upper.value} << kLowerBits | lower.value;
  const int64_t larger = upper.larger + lower.larger;
  if (larger + lower.equal == k) {
    find_first(n, k, indices, [&](int64_t i) { return magnitude_of(v[i]) >= threshold; });
    return;
  }
  find_first(n, larger, larger_ones, [&](int64_t i) { return magnitude_of(v[i]) > threshold; });
  find_first(n, k - larger, equal_ones, [&](int64_t i) { return magnitude_of(v[i]) == threshold; });
  std::merge(larger_ones, larger_ones + larger, equal_ones, equal_ones + (k - larger), indices);
}

}  // namespace dstrain
