#include "core/data/bigram.h"

#include <cmath>
#include <map>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "test/core/data/token_dataset_fixture.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

using test::TempFolder;

TEST_CASE("bigram: the formula, on a small example") {
  const TempFolder temp;
  const test::Documents train = {{0, 1, 0, 1, 0, 2}, {1, 0}, {3}}, valid = {{0, 1, 2}, {1, 3, 4}};
  const TokenDataset train_set = test::make_dataset(temp / "train", train, /*vocab_size=*/5);
  const TokenDataset valid_set = test::make_dataset(temp / "valid", valid, 5);
  const BigramScore score = score_bigram(train_set, valid_set);

  std::map<std::pair<int, int>, double> pairs;
  std::map<int, double> tokens, contexts;
  for (const auto& document : train)
    for (size_t i = 0; i < document.size(); ++i) {
      ++tokens[document[i]];
      if (i == 0) continue;
      ++pairs[{document[i - 1], document[i]}];
      ++contexts[document[i - 1]];
    }
  double bits = 0;
  for (const auto& document : valid)
    for (size_t i = 1; i < document.size(); ++i) {
      const int a = document[i - 1], b = document[i];
      bits -= std::log2((pairs[{a, b}] + score.delta * (tokens[b] + 1) / (9 + 5)) /
                        (contexts[a] + score.delta));
    }
  CHECK(score.train_tokens == 9);
  CHECK(score.targets == 4);
  CHECK(score.bits_per_token == Catch::Approx(bits / 4));
  CHECK(score.bits_per_byte == Catch::Approx(bits / 1000));  // the fixture's text size
}

// Documents whose next token is known from the last but for a share of noise.
test::Documents noisy_chain(uint64_t seed, int64_t tokens, double noise) {
  test::Documents documents(1);
  int32_t token = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    const uint64_t index = static_cast<uint64_t>(i);
    const bool random = random_uniform(seed, 0, index) < noise;
    token = random ? static_cast<int32_t>(random_u64(seed, 1, index) % 64) : (token * 5 + 1) % 64;
    documents[0].push_back(token);
  }
  return documents;
}

TEST_CASE("bigram: learns what pairs can tell, and smooths by how noisy they are") {
  const TempFolder temp;
  int run = 0;
  const auto score = [&](int64_t tokens, double noise) {
    const std::string name = temp / std::to_string(run++);
    return score_bigram(test::make_dataset(name + "t", noisy_chain(1, tokens, noise), 64),
                        test::make_dataset(name + "v", noisy_chain(2, 20000, noise), 64));
  };
  CHECK(score(100000, 0.0).bits_per_token < 0.01);
  const BigramScore noise = score(200000, 1.0);
  CHECK(noise.bits_per_token == Catch::Approx(6.0).margin(0.01));
  CHECK(noise.delta >= 1024);
  // Entropy of the chain: stays on it with 0.5 + 0.5 / 64.
  const double p = 0.5 + 0.5 / 64, q = 0.5 / 64;
  CHECK(score(400000, 0.5).bits_per_token ==
        Catch::Approx(-p * std::log2(p) - 63 * q * std::log2(q)).margin(0.05));
}

TEST_CASE("bigram: long documents are read in runs, none of their pairs lost") {
  const TempFolder temp;
  const TokenDataset dataset =
      test::make_dataset(temp / "set", noisy_chain(1, 2 * 65535 + 1, 0.3), 64);
  CHECK(score_bigram(dataset, dataset).targets == 2 * 65535);
  CHECK(score_bigram(dataset, dataset).train_tokens == 2 * 65535 + 1);
}

TEST_CASE("bigram: datasets without pairs get a sentence") {
  const TempFolder temp;
  const TokenDataset dataset = test::make_dataset(temp / "set", {{1}, {2}});
  CHECK_THROWS_WITH(score_bigram(dataset, dataset),
                    Catch::Contains("has no document of two tokens"));
}

}  // namespace
}  // namespace dstrain
