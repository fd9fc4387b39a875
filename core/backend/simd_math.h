// Functions that loops over float vectorise: no branch, no table, no call. The double versions use
// the C library and serve gradient checks.
//
// fast_exp(float): x = n ln 2 + r with |r| <= ln 2 / 2, then 2^n (1 + r + r^2 q(r)); q is a minimax
// polynomial of degree 4. The error is at most 1.01 ulp. Results below 2^-126 lose bits gradually,
// -inf gives 0, anything above 88.73 gives inf, NaN stays NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace dstrain {

inline float fast_exp(float x) {
  constexpr float kLog2E = 0x1.715476p+0f;
  // ln 2 in two parts; the first has so few bits that n times it is exact.
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  // Adding it leaves the nearest integer in the lowest bits of the sum.
  constexpr float kRound = 0x1.8p23f;
  // Limits beyond which the result is 0 or inf anyway. NaN passes both.
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float q = 0x1.6a2434p-10f;
  q = q * r + 0x1.1239e4p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const float mantissa = 1.0f + (r + r * r * q);
  // 2^n as a product of two powers: n runs from -150 to 128, further than one exponent reaches.
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const int32_t half = exponent >> 1;
  const float scale1 = std::bit_cast<float>((half + 127) << 23);
  const float scale2 = std::bit_cast<float>((exponent - half + 127) << 23);
  return mantissa * scale1 * scale2;
}

inline double fast_exp(double x) {
  return std::exp(x);
}

template <class F>
inline F sigmoid(F x) {
  return F(1) / (F(1) + fast_exp(-x));
}

template <class F>
inline F silu(F x) {
  return x * sigmoid(x);
}

// d silu(x) / dx = s (1 + x (1 - s)) with s = sigmoid(x).
template <class F>
inline F silu_derivative(F x) {
  const F s = sigmoid(x);
  return s * (F(1) + x * (F(1) - s));
}

}  // namespace dstrain
