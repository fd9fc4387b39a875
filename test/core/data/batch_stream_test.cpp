#include "core/data/batch_stream.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "test/core/data/token_dataset_fixture.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

using test::TempFolder;

// A stream with the memory of its slots.
class Stream {
 public:
  Stream(const std::vector<BatchSource>& sources, const BatchStreamOptions& options,
         int64_t slots = 3) {
    const int64_t bytes =
        slots * BatchStream::slot_bytes(options.micro_batch, options.pack.seq_len);
    memory_.reset(std::aligned_alloc(BatchStream::kSlotAlignment, static_cast<size_t>(bytes)));
    stream_ = std::make_unique<BatchStream>(sources, options, memory_.get(), bytes);
  }
  BatchStream* operator->() { return stream_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  std::unique_ptr<BatchStream> stream_;
};

// A sequence as the model sees it, keyed by sample id.
struct Sequence {
  std::vector<int32_t> tokens, targets, positions, segments;
  bool operator==(const Sequence&) const = default;
};
using Sequences = std::map<int64_t, Sequence>;

void take(const HostMicroBatch& batch, Sequences& out) {
  const int64_t T = batch.seq_len;
  int64_t segment = 0, valid = 0, longest = 0;
  for (int64_t j = 0; j < batch.sequences; ++j) {
    Sequence sequence;
    sequence.tokens.assign(batch.tokens_T + j * T, batch.tokens_T + (j + 1) * T);
    sequence.targets.assign(batch.targets_T + j * T, batch.targets_T + (j + 1) * T);
    sequence.positions.assign(batch.positions_T + j * T, batch.positions_T + (j + 1) * T);
    REQUIRE(batch.segment_offsets[segment] == j * T);  // no segment crosses a sequence
    for (; segment < batch.num_segments && batch.segment_offsets[segment] < (j + 1) * T;
         ++segment) {
      sequence.segments.push_back(batch.segment_offsets[segment] - static_cast<int32_t>(j * T));
      longest = std::max<int64_t>(
          longest, batch.segment_offsets[segment + 1] - batch.segment_offsets[segment]);
    }
    valid += T - std::count(sequence.targets.begin(), sequence.targets.end(), -1);
    if (batch.sample_ids[j] >= 0)
      REQUIRE(out.emplace(batch.sample_ids[j], std::move(sequence)).second);
  }
  REQUIRE(segment == batch.num_segments);
  REQUIRE(batch.segment_offsets[segment] == batch.sequences * T);
  REQUIRE(batch.valid_tokens == valid);
  REQUIRE(batch.max_segment_len == longest);
}

// Reads `steps` steps on every rank of a layout and puts them together.
Sequences read_steps(const std::vector<BatchSource>& sources, BatchStreamOptions options,
                     int64_t dp_size, int64_t steps, std::vector<int64_t>* step_valid = nullptr) {
  Sequences all;
  std::vector<int64_t> valid(static_cast<size_t>(steps)), announced(static_cast<size_t>(steps));
  options.dp_size = dp_size;
  for (int64_t rank = 0; rank < dp_size; ++rank) {
    options.dp_rank = rank;
    Stream stream(sources, options);
    for (int64_t i = 0; i < steps * stream->micro_batches_per_step(); ++i) {
      const HostMicroBatch& batch = stream->next();
      REQUIRE(batch.step == i / stream->micro_batches_per_step());
      REQUIRE(batch.micro_batch == i % stream->micro_batches_per_step());
      take(batch, all);
      valid[batch.step] += batch.valid_tokens;
      announced[batch.step] = batch.step_valid_tokens;
      stream->release();
    }
  }
  REQUIRE(valid == announced);
  if (step_valid != nullptr) *step_valid = announced;
  return all;
}

struct Fixture {
  TempFolder temp;
  TokenDataset a, b;
  std::vector<BatchSource> sources;
  BatchStreamOptions options;

  Fixture()
      : a(test::make_dataset(temp / "a", documents(1, 63))),
        b(test::make_dataset(temp / "b", documents(2, 25))),
        sources({{&a, 0.7}, {&b, 0.3}}) {
    options.pack.seq_len = 16;
    options.pack.seed = 3;
    options.vocab_size = 60000;
    options.micro_batch = 2;
    options.global_batch = 8;
  }

  static test::Documents documents(uint64_t seed, uint64_t count) {
    std::vector<int64_t> lengths;
    for (uint64_t d = 0; d < count; ++d)
      lengths.push_back(1 + static_cast<int64_t>(random_u64(seed, 0, d) % 30));
    return test::counted_documents(lengths);
  }
};

TEST_CASE("batch_stream: the samples of a step do not depend on the layout") {
  Fixture f;
  std::vector<int64_t> valid_1, valid_2, valid_4;
  const Sequences one = read_steps(f.sources, f.options, 1, 20, &valid_1);
  CHECK(one.size() == 160);
  CHECK(one.begin()->first == 0);
  CHECK(one.rbegin()->first == 159);
  CHECK(one == read_steps(f.sources, f.options, 2, 20, &valid_2));
  CHECK(one == read_steps(f.sources, f.options, 4, 20, &valid_4));
  CHECK(valid_1 == valid_2);
  CHECK(valid_1 == valid_4);
  f.options.micro_batch = 4;
  CHECK(one == read_steps(f.sources, f.options, 2, 20));
  f.options.global_batch = 16;  // the order of samples does not depend on the batch size either
  CHECK(one == read_steps(f.sources, f.options, 1, 10));
}

TEST_CASE("batch_stream: rows lie where the layout says") {
  Fixture f;
  f.options.dp_size = 2;
  f.options.dp_rank = 1;
  Stream stream(f.sources, f.options);
  REQUIRE(stream->micro_batches_per_step() == 2);
  for (int64_t first : {2, 6, 10, 14}) {
    const HostMicroBatch& batch = stream->next();
    CHECK(batch.sample_ids[0] == first);
    CHECK(batch.sample_ids[1] == first + 1);
    CHECK(batch.last_of_step == (first % 8 == 6));
    stream->release();
  }
}

TEST_CASE("batch_stream: a stream resumed at any cursor goes on as the uninterrupted one") {
  Fixture f;
  f.options.skip = {17, 18, 40, 41, 42};
  const Sequences all = read_steps(f.sources, f.options, 1, 30);
  for (int64_t stop = 0; stop < 30; stop += 3) {
    Stream first(f.sources, f.options);
    for (int64_t i = 0; i < stop * 4; ++i) {
      first->next();
      first->release();
    }
    // Handed out, but not a whole step released: all of it comes again.
    first->next();
    first->next();
    first->release();

    BatchStreamOptions resumed = f.options;
    resumed.start = first->cursor();
    Sequences rest = read_steps(f.sources, resumed, 2, 30 - stop);
    REQUIRE(rest.size() == static_cast<size_t>(8 * (30 - stop)));
    for (const auto& [id, sequence] : rest) REQUIRE(all.at(id) == sequence);
  }
}

TEST_CASE("batch_stream: each sample once per epoch, over three epochs with restarts") {
  Fixture f;
  const std::vector<BatchSource> sources = {{&f.b, 1.0}};
  const int64_t samples = EpochOrder::num_samples(f.b, f.options.pack);
  f.options.micro_batch = 1;
  f.options.global_batch = 4;
  std::vector<int> seen(static_cast<size_t>(f.b.num_tokens()) + 1);
  int64_t cursor = 0, count = 0;
  while (count < 3 * samples) {  // a new stream every second step, as after a kill
    f.options.start = cursor;
    Stream stream(sources, f.options);
    for (int i = 0; i < 8 && count < 3 * samples; ++i, ++count) {
      const HostMicroBatch& batch = stream->next();
      for (int64_t t = 0; t < batch.seq_len; ++t) ++seen[batch.tokens_T[t]];
      stream->release();
    }
    cursor = stream->cursor();
  }
  for (size_t token = 1; token < seen.size(); ++token) REQUIRE(seen[token] == 3);
}

TEST_CASE("batch_stream: evaluation reads each token once and pads the last step") {
  Fixture f;
  f.options.single_pass = true;
  f.options.pack.shuffle = false;
  const int64_t samples =
      EpochOrder::num_samples(f.a, f.options.pack) + EpochOrder::num_samples(f.b, f.options.pack);
  REQUIRE(samples % 8 != 0);  // the last step has pads
  int64_t valid = 0, ids = 0, announced = 0;
  for (int64_t rank = 0; rank < 2; ++rank) {
    f.options.dp_size = 2;
    f.options.dp_rank = rank;
    Stream stream(f.sources, f.options);
    REQUIRE(stream->num_steps() == (samples + 7) / 8);
    for (int64_t i = 0; i < stream->num_steps() * 2; ++i) {
      const HostMicroBatch& batch = stream->next();
      valid += batch.valid_tokens;
      if (rank == 0 && batch.last_of_step) announced += batch.step_valid_tokens;
      for (int64_t j = 0; j < 2; ++j) ids += batch.sample_ids[j] >= 0;
      stream->release();
    }
    CHECK_THROWS_WITH(stream->next(), Catch::Contains("the pass is over"));
  }
  CHECK(ids == samples);
  CHECK(valid == f.a.num_tokens() + f.b.num_tokens() - f.a.num_documents() - f.b.num_documents());
  CHECK(announced == valid);
}

TEST_CASE("batch_stream: a skipped sample shortens a single pass") {
  Fixture f;
  f.options.single_pass = true;
  f.options.micro_batch = f.options.global_batch = 1;
  const int64_t samples = EpochOrder::num_samples(f.b, f.options.pack);
  f.options.skip = {0, 3, 3, samples + 5};
  Stream stream({{&f.b, 1.0}}, f.options);
  CHECK(stream->num_steps() == samples - 2);
  for (int64_t i = 0; i < samples - 2; ++i) {
    CHECK(stream->next().sample_ids[0] >= 1);
    stream->release();
  }
}

TEST_CASE("batch_stream: errors of the reader come out of next(), in order") {
  Fixture f;
  f.options.pack.shuffle = false;
  f.options.micro_batch = f.options.global_batch = 1;
  f.options.vocab_size = 200;  // tokens count up: the first 12 samples are fine
  Stream stream({{&f.a, 1.0}}, f.options);
  for (int i = 0; i < 12; ++i) {
    stream->next();
    stream->release();
  }
  for (int repeat = 0; repeat < 2; ++repeat)
    CHECK_THROWS_WITH(stream->next(), Catch::Contains("holds the id 200"));
}

TEST_CASE("batch_stream: a damaged block is named by next()") {
  TempFolder temp;
  const TokenDataset dataset = test::make_dataset(temp / "set", test::counted_documents({40000}));
  std::string bytes = test::read_bytes(temp / "set/tokens-00000.bin");
  bytes[70000] ^= 4;
  test::write_bytes(temp / "set/tokens-00000.bin", bytes);
  BatchStreamOptions options;
  options.pack.seq_len = 100;
  options.pack.shuffle = false;
  options.vocab_size = 60000;
  Stream stream({{&dataset, 1.0}}, options);
  const auto read_all = [&] {
    for (;;) {
      stream->next();
      stream->release();
    }
  };
  CHECK_THROWS_WITH(read_all(), Catch::Contains("tokens-00000.bin' is damaged: bytes 65536 to"));
}

TEST_CASE("batch_stream: stops at once wherever the reader is") {
  Fixture f;
  for (int64_t slots : {1, 2, 5}) {
    Stream untouched(f.sources, f.options, slots);
    Stream used(f.sources, f.options, slots);
    used->next();
  }
  CHECK_THROWS_AS(
      [&] {
        Stream stream(f.sources, f.options, 1);
        stream->next();
        stream->next();
      }(),
      RuntimeFailure);
}

TEST_CASE("batch_stream: slots are filled while others are in use") {
  Fixture f;
  Stream stream(f.sources, f.options, 2);
  Sequences sequences;
  const HostMicroBatch* held = &stream->next();
  for (int i = 0; i < 20; ++i) {  // always one behind
    const HostMicroBatch* newer = &stream->next();
    take(*held, sequences);
    stream->release();
    held = newer;
  }
  Fixture g;
  const Sequences expected = read_steps(g.sources, g.options, 1, 5);
  REQUIRE(sequences.size() == 40);
  for (const auto& [id, sequence] : sequences) REQUIRE(expected.at(id) == sequence);
}

}  // namespace
}  // namespace dstrain
