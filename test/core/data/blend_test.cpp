#include "core/data/blend.h"

#include <cmath>
#include <numeric>

#include "core/base/rng.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

TEST_CASE("blend: counts stay within one of the exact share, for many sources and weights") {
  for (uint64_t trial = 0; trial < 60; ++trial) {
    std::vector<double> weights(1 + random_u64(5, 1, trial) % 12);
    for (size_t s = 0; s < weights.size(); ++s)
      weights[s] = std::pow(random_uniform(5, 2 + trial, s), 4) + 1e-4;
    if (trial % 3 == 0) weights.assign(weights.size(), 1.0);
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    std::vector<int64_t> counts(weights.size());
    Blend blend(weights);
    for (int64_t n = 1; n <= 2000; ++n) {
      const Blend::Draw draw = blend.next();
      REQUIRE(draw.index == counts[draw.source]++);
      for (size_t s = 0; s < weights.size(); ++s) {
        const double off = std::fabs(counts[s] - weights[s] / total * static_cast<double>(n));
        if (off >= 1 + 1e-9)
          FAIL("trial " << trial << " n " << n << " source " << s << ": " << off);
      }
    }
  }
}

TEST_CASE("blend: weights 2 to 1 repeat their pattern, ties go to the earlier source") {
  Blend blend({2.0, 1.0});
  std::vector<int64_t> sources;
  for (int i = 0; i < 6; ++i) sources.push_back(blend.next().source);
  CHECK(sources == std::vector<int64_t>{0, 0, 1, 0, 0, 1});
  Blend equal({0.25, 0.25, 0.25});
  sources.clear();
  for (int i = 0; i < 6; ++i) sources.push_back(equal.next().source);
  CHECK(sources == std::vector<int64_t>{0, 1, 2, 0, 1, 2});
}

TEST_CASE("blend: skipping ahead equals going there") {
  const std::vector<double> weights = {0.7, 0.2, 0.1, 3e-9};
  Blend walked(weights), skipped(weights);
  for (int i = 0; i < 12345; ++i) walked.next();
  skipped.skip_to(12345);
  for (int i = 0; i < 100; ++i) {
    const Blend::Draw a = walked.next(), b = skipped.next();
    REQUIRE(a.source == b.source);
    REQUIRE(a.index == b.index);
  }
}

TEST_CASE("blend: one source skips at once") {
  Blend blend({0.3});
  blend.skip_to(int64_t{1} << 50);
  CHECK(blend.next().index == int64_t{1} << 50);
}

}  // namespace
}  // namespace dstrain
