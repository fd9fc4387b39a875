// Damage at rest: every flipped bit, truncation and exchanged file must be found, named and
// answered with the checkpoint before.
#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/checkpoint/store.h"
#include "test/core/checkpoint/checkpoint_fixture.h"

namespace dstrain {
namespace {

using Catch::Contains;
using checkpoint_test::read_bytes;
using checkpoint_test::save_tiny;
using checkpoint_test::ScratchFolder;
using checkpoint_test::TinyState;
using checkpoint_test::write_bytes;

// Two checkpoints of two shards each, the newer one to be damaged.
class TwoCheckpoints {
 public:
  TwoCheckpoints() : store(folder.path(), 5), older(save(10)), newer(save(20)) {}

  // Damage must be found in the newer one, with its file in the text, and the older one be taken.
  std::string check_found(const std::string& file) {
    std::string line;
    const auto latest = store.latest([&](const std::string& rejected) { line = rejected; });
    REQUIRE(latest.has_value());
    CHECK(latest->path == older);
    CHECK_THAT(line, Contains("step-00000020") && Contains(file));
    return line;
  }

  ScratchFolder folder;
  CheckpointStore store;
  std::string older, newer;

 private:
  std::string save(int64_t step) {
    const TinyState tiny(step);
    const std::vector<StateTensor> state = tiny.state();
    const SaveAttempt attempt = store.begin(step);
    const std::span<const StateTensor> all(state);
    const std::vector<ShardInfo> shards = {store.write_shard(attempt, 0, all.first(3)),
                                           store.write_shard(attempt, 1, all.subspan(3))};
    return store.commit(attempt, shards, tiny.meta());
  }
};

const std::string kFiles[] = {"manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"};

}  // namespace

TEST_CASE("corruption: one flipped bit anywhere is found and its tensor named",
          "[store][corruption]") {
  TwoCheckpoints two;
  CHECK(two.store.latest({})->path == two.newer);
  int named_tensors = 0;
  for (uint64_t i = 0; i < 200; ++i) {
    const std::string file = kFiles[i % std::size(kFiles)], path = two.newer + "/" + file;
    const std::string good = read_bytes(path);
    const uint64_t bit = random_u64(5, 1, i) % (good.size() * 8);
    CAPTURE(file, bit);
    std::string damaged = good;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    write_bytes(path, damaged);
    const std::string line = two.check_found(file);
    write_bytes(path, good);
    if (file == "manifest.json") continue;
    const SafetensorsReader reader(path);
    for (const SafetensorsEntry& entry : reader.tensors()) {
      const auto at = static_cast<int64_t>(bit / 8);
      if (at < entry.offset || at >= entry.offset + entry.bytes) continue;
      CHECK_THAT(line, Contains("xxh3 mismatch at tensor '" + entry.name + "'"));
      ++named_tensors;
    }
  }
  CHECK(named_tensors > 40);
  CHECK(two.store.latest({})->path == two.newer);
}

TEST_CASE("corruption: truncated, lengthened, zeroed and missing files", "[store][corruption]") {
  TwoCheckpoints two;
  for (const std::string& file : kFiles) {
    const std::string path = two.newer + "/" + file, good = read_bytes(path);
    for (uint64_t i = 0; i < 40; ++i) {
      write_bytes(path, good.substr(0, random_u64(6, 1, i) % good.size()));
      two.check_found(file);
    }
    for (const size_t length : {size_t{0}, size_t{7}, size_t{8}, good.size() - 1}) {
      write_bytes(path, good.substr(0, length));
      two.check_found(file);
    }
    write_bytes(path, good + '\0');
    two.check_found(file);
    std::string zero_tail = good;
    std::fill(zero_tail.end() - 5, zero_tail.end(), '\0');
    write_bytes(path, zero_tail);
    two.check_found(file);
    std::filesystem::remove(path);
    two.check_found(file);
    std::filesystem::create_directory(path);
    two.check_found(file);
    std::filesystem::remove(path);
    write_bytes(path, good);
  }
  CHECK(two.store.latest({})->path == two.newer);
}

TEST_CASE("corruption: exchanged shards, and a shard of another step", "[store][corruption]") {
  TwoCheckpoints two;
  const std::string a = two.newer + "/rank-00000.safetensors",
                    b = two.newer + "/rank-00001.safetensors";
  const std::string good_a = read_bytes(a), good_b = read_bytes(b);
  write_bytes(a, good_b);
  write_bytes(b, good_a);
  two.check_found("rank-00000.safetensors");
  write_bytes(b, good_b);
  write_bytes(a, read_bytes(two.older + "/rank-00000.safetensors"));  // as long, other values
  CHECK_THAT(two.check_found("rank-00000.safetensors"),
             Contains("xxh3 mismatch at tensor 'embed'"));
  write_bytes(a, good_a);
  write_bytes(two.newer + "/manifest.json", read_bytes(two.older + "/manifest.json"));
  two.check_found("manifest.json");
}

TEST_CASE("corruption: a report lists a limited number of problems per file",
          "[store][corruption]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 5);
  const std::vector<uint8_t> zeros(1), ones(1, 1);
  const auto save = [&](int64_t step, const std::vector<uint8_t>& value) {
    std::vector<StateTensor> state;
    for (int i = 0; i < 50; ++i)
      state.push_back({fmt::format("t{}", i), DType::u8, {1}, {0}, {1}, value.data()});
    return store.save(TinyState(step).meta(), state);
  };
  const std::string a = save(10, zeros), b = save(20, ones);
  write_bytes(b + "/rank-00000.safetensors", read_bytes(a + "/rank-00000.safetensors"));
  const CheckpointReport report = check_checkpoint(b, CheckDepth::contents);
  CHECK(report.problems.size() == 11);
  CHECK_THAT(report.problems.back(), Contains("40 more problems"));
  CHECK_THAT(report.summary(), Contains("(and 10 more)"));
}

}  // namespace dstrain
