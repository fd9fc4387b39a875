#include "core/backend/simd_math.h"

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "test/support/catch.h"

namespace dstrain {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// |got - want| in units of the last place of a float near want.
double ulps(float got, double want) {
  int exponent = 0;
  std::frexp(want, &exponent);
  return std::fabs(double{got} - want) / std::ldexp(1.0, std::max(exponent - 24, -149));
}

}  // namespace

TEST_CASE("fast_exp: at most 1.01 ulp from the smallest to the largest result") {
  // Every 1021st float, evaluated by a loop that the compiler vectorises.
  std::vector<float> x;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1021) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (value > -104.0f && value < 88.72f) x.push_back(value);
  }
  std::vector<float> y(x.size());
#pragma omp simd
  for (size_t i = 0; i < x.size(); ++i) y[i] = fast_exp(x[i]);
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) worst = std::max(worst, ulps(y[i], std::exp(double{x[i]})));
  CHECK(worst < 1.01);
  CHECK(worst > 0.5);
}

TEST_CASE("fast_exp: special values") {
  CHECK(fast_exp(0.0f) == 1);
  CHECK(fast_exp(-0.0f) == 1);
  CHECK(fast_exp(-kInf) == 0);
  CHECK(fast_exp(-1e30f) == 0);
  CHECK(fast_exp(-104.0f) == 0);
  CHECK(fast_exp(kInf) == kInf);
  CHECK(fast_exp(1e30f) == kInf);
  CHECK(fast_exp(88.8f) == kInf);
  CHECK(std::isnan(fast_exp(std::numeric_limits<float>::quiet_NaN())));
  CHECK(fast_exp(1.0) == std::exp(1.0));
}

TEST_CASE("sigmoid and silu") {
  for (float x = -80; x < 80; x += 0.37f) {
    const double s = 1 / (1 + std::exp(-double{x}));
    CHECK(ulps(sigmoid(x), s) < 3);
    CHECK(ulps(silu(x), x * s) < 4);
    // Absolute, because it crosses zero.
    CHECK(silu_derivative(x) == Approx(s * (1 + x * (1 - s))).epsilon(1e-6).margin(2e-7));
    CHECK(sigmoid(double{x}) == Approx(s).epsilon(1e-15));
  }
  CHECK(sigmoid(-kInf) == 0);
  CHECK(sigmoid(kInf) == 1);
  CHECK(silu(-1e4f) == 0);
  CHECK(silu(1e4f) == 1e4f);
  CHECK(silu_derivative(-1e4f) == 0);
  CHECK(silu_derivative(1e4f) == 1);
}

TEST_CASE("silu_derivative is the derivative of silu") {
  for (double x = -20; x < 20; x += 0.31) {
    const double step = 1e-5;
    const double numeric = (silu(x + step) - silu(x - step)) / (2 * step);
    CHECK(silu_derivative(x) == Approx(numeric).margin(1e-9));
  }
}

}  // namespace dstrain
