#include "core/data/packer.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "core/base/error.h"
#include "core/data/sample_order.h"
#include "test/core/data/token_dataset_fixture.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

using test::TempFolder;
using Ids = std::vector<int32_t>;

struct Packed {
  Ids tokens, targets, positions, segments;
};

Packed pack(const TokenDataset& dataset, const EpochOrder& order, const PackOptions& options,
            int64_t k, int64_t vocab_size = 60000) {
  const size_t length = static_cast<size_t>(options.seq_len);
  Packed out{Ids(length, -7), Ids(length, -7), Ids(length, -7), {}};
  SequencePacker packer(options);
  packer.pack(dataset, order, k, vocab_size,
              {out.tokens.data(), out.targets.data(), out.positions.data()}, out.segments);
  return out;
}

PackOptions in_file_order(int64_t seq_len) {
  PackOptions options;
  options.seq_len = seq_len;
  options.shuffle = false;
  return options;
}

TEST_CASE("permutation: a bijection for every size, and another one per key") {
  for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 100, 1000, 1025}) {
    const Permutation order(n, 17);
    std::vector<bool> seen(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) seen.at(static_cast<size_t>(order(i))) = true;
    CHECK(std::count(seen.begin(), seen.end(), true) == n);
  }
  int64_t same = 0;
  for (int64_t i = 0; i < 1000; ++i) same += Permutation(1000, 1)(i) == Permutation(1000, 2)(i);
  CHECK(same < 10);
}

TEST_CASE("permutation: small orders are uniform over the keys") {
  std::map<std::vector<int64_t>, int> counts;  // 24 orders of 4; 200 expected each
  for (uint64_t key = 0; key < 4800; ++key) {
    const Permutation order(4, random_u64(3, 0, key));
    ++counts[{order(0), order(1), order(2), order(3)}];
  }
  CHECK(counts.size() == 24);
  for (const auto& [order, count] : counts) CHECK(std::abs(count - 200) < 70);  // 5 sigma

  std::vector<std::vector<int>> places(5, std::vector<int>(5));  // element by place; 400 expected
  for (uint64_t key = 0; key < 2000; ++key)
    for (int64_t i = 0; i < 5; ++i) ++places[i][Permutation(5, random_u64(4, 0, key))(i)];
  for (const auto& row : places)
    for (int count : row) CHECK(std::abs(count - 400) < 100);
}

TEST_CASE("packer: an example by hand") {
  const TempFolder temp;
  // Documents 1 2 3 | 4 | 5 6 7 8 9 | 10 11 in samples of 4: 1 2 3 4 | 5 6 7 8 | 9 10 11 pad.
  const TokenDataset dataset =
      test::make_dataset(temp / "set", test::counted_documents({3, 1, 5, 2}));
  const PackOptions options = in_file_order(4);
  const EpochOrder order(dataset, options, 0, 0);
  REQUIRE(order.num_samples() == 3);

  const Packed first = pack(dataset, order, options, 0);
  CHECK(first.tokens == Ids{1, 2, 3, 4});
  CHECK(first.targets == Ids{2, 3, -1, -1});
  CHECK(first.positions == Ids{0, 1, 2, 0});
  CHECK(first.segments == Ids{3, 1});
  CHECK(order.valid_targets(0) == 2);

  const Packed second = pack(dataset, order, options, 1);  // its document goes on in the third
  CHECK(second.tokens == Ids{5, 6, 7, 8});
  CHECK(second.targets == Ids{6, 7, 8, 9});
  CHECK(second.positions == Ids{0, 1, 2, 3});
  CHECK(second.segments == Ids{4});
  CHECK(order.valid_targets(1) == 4);

  const Packed third = pack(dataset, order, options, 2);
  CHECK(third.tokens == Ids{9, 10, 11, 0});
  CHECK(third.targets == Ids{-1, 11, -1, -1});
  CHECK(third.positions == Ids{0, 0, 1, 0});
  CHECK(third.segments == Ids{1, 2, 1});
  CHECK(order.valid_targets(2) == 1);
}

TEST_CASE("packer: the same without document mask") {
  const TempFolder temp;
  const TokenDataset dataset =
      test::make_dataset(temp / "set", test::counted_documents({3, 1, 5, 2}));
  PackOptions options = in_file_order(4);
  options.document_mask = false;
  const EpochOrder order(dataset, options, 0, 0);

  const Packed first = pack(dataset, order, options, 0);
  CHECK(first.targets == Ids{2, 3, 4, 5});
  CHECK(first.positions == Ids{0, 1, 2, 3});
  CHECK(first.segments == Ids{4});
  CHECK(order.valid_targets(0) == 4);
  const Packed third = pack(dataset, order, options, 2);
  CHECK(third.targets == Ids{10, 11, -1, -1});
  CHECK(third.segments == Ids{3, 1});
  CHECK(order.valid_targets(2) == 2);
}

TEST_CASE("packer: every token is an input once per epoch, whatever the options") {
  const TempFolder temp;
  std::vector<int64_t> lengths;
  for (uint64_t d = 0; d < 150; ++d)
    lengths.push_back(1 + static_cast<int64_t>(random_u64(11, 0, d) % 40));
  const TokenDataset dataset = test::make_dataset(temp / "set", test::counted_documents(lengths));
  std::vector<int32_t> document_of(static_cast<size_t>(dataset.num_tokens()) + 2);
  for (int64_t d = 0; d < dataset.num_documents(); ++d)
    for (int64_t t = dataset.document_range(d).begin; t < dataset.document_range(d).end; ++t)
      document_of[t + 1] = static_cast<int32_t>(d + 1);  // by token, which is its place + 1

  PackOptions options;
  options.seq_len = GENERATE(1, 2, 16, 33, 1000, 5000);
  options.shuffle = GENERATE(false, true);
  options.document_mask = GENERATE(false, true);
  options.seed = 5;
  CAPTURE(options.seq_len, options.shuffle, options.document_mask);
  for (int64_t epoch : {0, 1, 7}) {
    const EpochOrder order(dataset, options, 2, epoch);
    std::vector<int> seen(static_cast<size_t>(dataset.num_tokens()) + 1);
    int64_t targets = 0;
    for (int64_t k = 0; k < order.num_samples(); ++k) {
      const Packed packed = pack(dataset, order, options, k);
      int64_t valid = 0, segment = 0, segment_end = packed.segments[0];
      for (int64_t t = 0; t < options.seq_len; ++t) {
        if (t == segment_end) segment_end += packed.segments[++segment];
        const int32_t token = packed.tokens[t], target = packed.targets[t];
        ++seen[token];
        valid += target != -1;
        if (token == 0) {
          REQUIRE(target == -1);
          continue;
        }
        const bool starts_segment = t == segment_end - packed.segments[segment];
        REQUIRE(packed.positions[t] == (starts_segment ? 0 : packed.positions[t - 1] + 1));
        if (!options.document_mask) continue;
        const bool ends_document = document_of[token] != document_of[token + 1];
        REQUIRE(target == (ends_document ? -1 : token + 1));
        if (!starts_segment) REQUIRE(token == packed.tokens[t - 1] + 1);
      }
      REQUIRE(segment_end == options.seq_len);
      REQUIRE(order.valid_targets(k) == valid);
      targets += valid;
    }
    seen[0] = 1;  // pads
    REQUIRE(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
    CHECK(targets == dataset.num_tokens() - (options.document_mask ? dataset.num_documents() : 1));
  }
}

TEST_CASE("packer: epochs, sources and seeds have orders of their own") {
  const TempFolder temp;
  const TokenDataset dataset =
      test::make_dataset(temp / "set", test::counted_documents(std::vector<int64_t>(500, 3)));
  const auto first_tokens = [&](uint64_t seed, int64_t source, int64_t epoch) {
    PackOptions options;
    options.seq_len = 30;
    options.seed = seed;
    const EpochOrder order(dataset, options, source, epoch);
    return pack(dataset, order, options, 0).tokens;
  };
  const Ids base = first_tokens(1, 0, 0);
  CHECK(base == first_tokens(1, 0, 0));
  CHECK(base != first_tokens(2, 0, 0));
  CHECK(base != first_tokens(1, 1, 0));
  CHECK(base != first_tokens(1, 0, 1));
}

TEST_CASE("packer: the samples of one long document come in random order too") {
  const TempFolder temp;
  const TokenDataset dataset = test::make_dataset(temp / "set", test::counted_documents({5000}));
  PackOptions options;
  options.seq_len = 10;
  const EpochOrder order(dataset, options, 0, 0);
  int64_t neighbours = 0;
  for (int64_t k = 1; k < order.num_samples(); ++k)
    neighbours += pack(dataset, order, options, k).tokens[0] ==
                  pack(dataset, order, options, k - 1).tokens[0] + options.seq_len;
  CHECK(neighbours < 10);  // 1 expected of 499
}

TEST_CASE("packer: empty Megatron documents are stepped over") {
  const TempFolder temp;
  TokenDatasetParts parts;
  test::make_dataset(temp / "set", test::counted_documents({3, 4}));
  parts.path = temp / "set";
  parts.shards.push_back({ReadOnlyFile(temp / "set/tokens-00000.bin"), 0, 0, 7});
  parts.document_ends = {0, 3, 3, 3, 7, 7};
  parts.vocab_size = 60000;
  const TokenDataset dataset(std::move(parts));
  PackOptions options;
  options.seq_len = 3;
  options.shuffle = GENERATE(false, true);
  const EpochOrder order(dataset, options, 0, 0);
  int64_t valid = 0, sum = 0;
  for (int64_t k = 0; k < order.num_samples(); ++k) {
    valid += order.valid_targets(k);
    const Packed packed = pack(dataset, order, options, k);
    sum = std::accumulate(packed.tokens.begin(), packed.tokens.end(), sum);
    for (int32_t length : packed.segments) CHECK(length > 0);
  }
  CHECK(valid == 5);
  CHECK(sum == 28);
}

TEST_CASE("packer: an id outside the model's vocabulary is named") {
  const TempFolder temp;
  const TokenDataset dataset = test::make_dataset(temp / "set", {{1, 2, 700, 3}});
  const PackOptions options = in_file_order(3);
  const EpochOrder order(dataset, options, 0, 0);
  CHECK_THROWS_WITH(pack(dataset, order, options, 0, 700),
                    Catch::Contains("at token 2 (byte 4") && Catch::Contains("id 700"));
}

TEST_CASE("sample_order: skipped ids are left out, the others keep their meaning") {
  const TempFolder temp;
  const TokenDataset a =
      test::make_dataset(temp / "a", test::counted_documents(std::vector<int64_t>(20, 7)));
  const TokenDataset b =
      test::make_dataset(temp / "b", test::counted_documents(std::vector<int64_t>(9, 5)));
  PackOptions options;
  options.seq_len = 8;
  const std::vector<BatchSource> sources = {{&a, 3}, {&b, 1}};
  SampleOrder all(sources, options, false, 0, {});
  SampleOrder some(sources, options, false, 0, {4, 0, 5, 11});
  for (int64_t id = 0; id < 200; ++id) {
    const SampleRef expected = all.next();
    REQUIRE(expected.id == id);
    if (id == 0 || id == 4 || id == 5 || id == 11) continue;
    const SampleRef got = some.next();
    REQUIRE(std::tie(got.id, got.source, got.epoch, got.k) ==
            std::tie(expected.id, expected.source, expected.epoch, expected.k));
  }
}

TEST_CASE("sample_order: each source gives each sample once per epoch") {
  const TempFolder temp;
  const TokenDataset a =
      test::make_dataset(temp / "a", test::counted_documents(std::vector<int64_t>(20, 7)));
  const TokenDataset b =
      test::make_dataset(temp / "b", test::counted_documents(std::vector<int64_t>(9, 5)));
  PackOptions options;
  options.seq_len = 8;
  SampleOrder order({{&a, 3}, {&b, 1}}, options, false, 0, {});
  std::map<std::tuple<int64_t, int64_t, int64_t>, int> seen;
  for (int64_t id = 0; id < 18 * 4 * 3; ++id) {  // 3 parts of 4 go to a, which has 18 samples
    const SampleRef sample = order.next();
    ++seen[{sample.source, sample.epoch, sample.k}];
  }
  for (int64_t epoch = 0; epoch < 9; ++epoch)
    for (int64_t k = 0; k < 18; ++k) REQUIRE(seen[{0, epoch, k}] == 1);
  for (int64_t epoch = 0; epoch < 9; ++epoch)
    for (int64_t k = 0; k < 6; ++k) REQUIRE(seen[{1, epoch, k}] == 1);
}

TEST_CASE("sample_order: too little data gets a sentence") {
  const TempFolder temp;
  const TokenDataset dataset = test::make_dataset(temp / "set", test::counted_documents({8}));
  PackOptions options;
  options.seq_len = 8;
  CHECK_THROWS_WITH(SampleOrder({{&dataset, 1}}, options, false, 0, {}),
                    Catch::Contains("holds 8 tokens, but one sequence takes") &&
                        Catch::Contains("lower data.seq_len to 7"));
  CHECK(SampleOrder({{&dataset, 1}}, options, true, 0, {}).num_samples() == 1);
}

}  // namespace
}  // namespace dstrain
