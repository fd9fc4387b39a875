// The samples of a run, put together from all data-parallel ranks: every token once per epoch, in
// one order whatever the layout is and wherever the run was resumed.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/base/rng.h"
#include "core/data/batch_stream.h"
#include "parallel/mesh.h"
#include "test/core/data/token_dataset_fixture.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

constexpr int64_t kSeqLen = 16, kGlobalBatch = 24;

// What the model sees of one sample.
struct Sample {
  int64_t id = -1;
  std::vector<int32_t> tokens, targets, positions;
  bool operator==(const Sample&) const = default;
};
using Samples = std::vector<Sample>;

struct Layout {
  MeshShape shape;
  int64_t micro_batch = 1;
};

// The samples of `steps` steps in the order of their places in the global batch, and the cursor
// after them.
struct Reading {
  Samples samples;
  int64_t cursor = 0;
};

class Corpus {
 public:
  Corpus()
      : a_(test::make_dataset(temp_ / "a", documents(1, 45))),
        b_(test::make_dataset(temp_ / "b", documents(2, 20))) {}

  std::vector<BatchSource> one() const { return {{&a_, 1.0}}; }
  std::vector<BatchSource> both() const { return {{&a_, 0.6}, {&b_, 0.4}}; }
  const TokenDataset& a() const { return a_; }

 private:
  static test::Documents documents(uint64_t seed, uint64_t count) {
    std::vector<int64_t> lengths;
    for (uint64_t d = 0; d < count; ++d)
      lengths.push_back(1 + static_cast<int64_t>(random_u64(seed, 0, d) % 40));
    return test::counted_documents(lengths);
  }

  test::TempFolder temp_;
  TokenDataset a_, b_;
};

// One rank's rows, in its own order.
Reading read_rank(const std::vector<BatchSource>& sources, const Layout& layout, int world_rank,
                  int64_t start, int64_t steps) {
  BatchStreamOptions options;
  options.pack = {.seq_len = kSeqLen, .seed = 11};
  options.vocab_size = 60000;
  options.micro_batch = layout.micro_batch;
  options.global_batch = kGlobalBatch;
  const AxisPlace data = place_of(layout.shape, world_rank).data;
  options.dp_rank = data.rank;
  options.dp_size = data.size;
  options.start = start;
  const int64_t bytes = 3 * BatchStream::slot_bytes(options.micro_batch, kSeqLen);
  const std::unique_ptr<void, void (*)(void*)> memory(
      std::aligned_alloc(BatchStream::kSlotAlignment, static_cast<size_t>(bytes)), std::free);
  BatchStream stream(sources, options, memory.get(), bytes);
  Reading reading;
  for (int64_t i = 0; i < steps * stream.micro_batches_per_step(); ++i) {
    const HostMicroBatch& batch = stream.next();
    for (int64_t j = 0; j < batch.sequences; ++j) {
      const auto row = [&](const int32_t* x_T) {
        return std::vector<int32_t>(x_T + j * kSeqLen, x_T + (j + 1) * kSeqLen);
      };
      reading.samples.push_back(
          {batch.sample_ids[j], row(batch.tokens_T), row(batch.targets_T), row(batch.positions_T)});
    }
    stream.release();
  }
  reading.cursor = stream.cursor();
  return reading;
}

// All ranks of the layout. Ranks that differ in other axes than data must read the same.
Reading read_layout(const std::vector<BatchSource>& sources, const Layout& layout, int64_t start,
                    int64_t steps) {
  Reading whole;
  whole.samples.resize(static_cast<size_t>(steps * kGlobalBatch));
  std::vector<Reading> by_data_rank(static_cast<size_t>(layout.shape.data));
  for (int rank = 0; rank < layout.shape.ranks(); ++rank) {
    const int d = place_of(layout.shape, rank).data.rank;
    Reading reading = read_rank(sources, layout, rank, start, steps);
    Reading& first = by_data_rank[static_cast<size_t>(d)];
    if (!first.samples.empty()) {
      REQUIRE(reading.samples == first.samples);
      REQUIRE(reading.cursor == first.cursor);
      continue;
    }
    // Rows of a micro-batch lie side by side, those of the next data-parallel rank behind them.
    const int64_t m = layout.micro_batch;
    for (int64_t i = 0; i < std::ssize(reading.samples); ++i)
      whole.samples.at(static_cast<size_t>((i / m * layout.shape.data + d) * m + i % m)) =
          reading.samples[static_cast<size_t>(i)];
    whole.cursor = reading.cursor;
    first = std::move(reading);
  }
  for (const Reading& reading : by_data_rank) REQUIRE(reading.cursor == whole.cursor);
  return whole;
}

const std::vector<Layout> kLayouts = {{{1, 1, 1, 1}, 1},   {{1, 1, 1, 1}, 24}, {{1, 2, 1, 1}, 4},
                                      {{1, 3, 1, 1}, 2},   {{1, 4, 1, 1}, 3},  {{1, 8, 1, 1}, 1},
                                      {{1, 24, 1, 1}, 1},  {{2, 2, 2, 1}, 2},  {{1, 4, 1, 2}, 6},
                                      {{2, 2, 1, 2, 4}, 3}};

}  // namespace

TEST_CASE("sample order: the same samples in the same places in every layout", "[mesh]") {
  const Corpus corpus;
  const Reading expected = read_layout(corpus.both(), kLayouts[0], 0, 10);
  for (size_t i = 0; i < expected.samples.size(); ++i)
    REQUIRE(expected.samples[i].id == static_cast<int64_t>(i));
  for (const Layout& layout : kLayouts) {
    CAPTURE(to_text(layout.shape), layout.micro_batch);
    const Reading reading = read_layout(corpus.both(), layout, 0, 10);
    CHECK(reading.samples == expected.samples);
    CHECK(reading.cursor == expected.cursor);
  }
}

TEST_CASE("sample order: resumed after any step in any layout", "[mesh]") {
  const Corpus corpus;
  constexpr int64_t kSteps = 9;
  const Samples expected = read_layout(corpus.both(), kLayouts[0], 0, kSteps).samples;
  for (int64_t stop = 0; stop <= kSteps; ++stop)
    for (size_t k = 0; k < kLayouts.size(); ++k) {
      const Layout &before = kLayouts[k], &after = kLayouts[(k + 3) % kLayouts.size()];
      CAPTURE(stop, to_text(before.shape), to_text(after.shape));
      const Reading first = read_layout(corpus.both(), before, 0, stop);
      Samples samples = first.samples;
      const Samples rest = read_layout(corpus.both(), after, first.cursor, kSteps - stop).samples;
      samples.insert(samples.end(), rest.begin(), rest.end());
      REQUIRE(samples == expected);
    }
}

TEST_CASE(
    "sample order: each token once per epoch over all ranks, with a change of layout at every "
    "resume",
    "[mesh]") {
  const Corpus corpus;
  PackOptions pack;
  pack.seq_len = kSeqLen;
  const int64_t epoch = EpochOrder::num_samples(corpus.a(), pack);
  REQUIRE(epoch % kGlobalBatch != 0);  // epochs end inside of steps
  const int64_t steps = 3 * epoch / kGlobalBatch;
  REQUIRE(steps >= 4);

  Samples samples;
  int64_t cursor = 0;
  for (int64_t step = 0, k = 0; step < steps; ++k) {
    const int64_t count = std::min<int64_t>(1 + k % 2, steps - step);
    const Reading reading = read_layout(
        corpus.one(), kLayouts[static_cast<size_t>(k) % kLayouts.size()], cursor, count);
    samples.insert(samples.end(), reading.samples.begin(), reading.samples.end());
    cursor = reading.cursor;
    step += count;
  }

  // Token i of the corpus is i + 1; 0 is a pad.
  std::vector<std::vector<int32_t>> orders;
  for (int64_t e = 0; (e + 1) * epoch <= std::ssize(samples); ++e) {
    std::vector<int32_t> tokens;
    for (int64_t i = e * epoch; i < (e + 1) * epoch; ++i) {
      const Sample& sample = samples[static_cast<size_t>(i)];
      for (size_t t = 0; t < sample.tokens.size(); ++t)
        if (sample.targets[t] != -1 || sample.tokens[t] != 0) tokens.push_back(sample.tokens[t]);
    }
    orders.push_back(tokens);
    std::sort(tokens.begin(), tokens.end());
    std::vector<int32_t> expected = test::all_tokens(corpus.a());
    REQUIRE(tokens == expected);
  }
  REQUIRE(orders.size() >= 2);
  CHECK(orders[0] != orders[1]);  // each epoch has an order of its own
}

}  // namespace dstrain
