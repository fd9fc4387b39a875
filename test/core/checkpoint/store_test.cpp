#include "core/checkpoint/store.h"

#include <unistd.h>

#include "core/base/error.h"
#include "test/core/checkpoint/checkpoint_fixture.h"

namespace dstrain {
namespace {

using Catch::Contains;
using checkpoint_test::names_in;
using checkpoint_test::read_bytes;
using checkpoint_test::save_tiny;
using checkpoint_test::ScratchFolder;
using checkpoint_test::TinyState;
using checkpoint_test::write_bytes;

// latest()'s step, -1 for none; rejected lines are collected.
int64_t latest_step(CheckpointStore& store, std::vector<std::string>* rejected = nullptr) {
  const auto latest = store.latest([&](const std::string& line) {
    if (rejected != nullptr) rejected->push_back(line);
  });
  return latest ? latest->manifest.meta.step : -1;
}

void flip_byte(const std::string& path, size_t at) {
  std::string bytes = read_bytes(path);
  bytes[at] = static_cast<char>(bytes[at] ^ 4);
  write_bytes(path, bytes);
}

}  // namespace

TEST_CASE("store: names", "[store]") {
  CHECK(checkpoint_name(1200) == "step-00001200");
  CHECK(checkpoint_name(int64_t{1} << 40) == "step-1099511627776");
  CHECK(parse_checkpoint_name("step-00001200") == 1200);
  CHECK(parse_checkpoint_name("step-1099511627776") == int64_t{1} << 40);
  for (const char* name :
       {"step-1200", "step-000001200", "step-0000120a", "step--0001200", "step-", "Step-00001200",
        "step-00001200.tmp-0", "step-99999999999999999999", "xstep-00001200"})
    CHECK_FALSE(parse_checkpoint_name(name).has_value());
  const std::string a = temporary_name(7, TemporaryKind::tmp),
                    b = temporary_name(7, TemporaryKind::deleted);
  CHECK(is_temporary_name(a));
  CHECK(is_temporary_name(b));
  CHECK(a.substr(0, 18) == "step-00000007.tmp-");
  CHECK(a.substr(a.size() - 32) != b.substr(b.size() - 32));
  for (const char* name : {"step-00000007", "step-00000007.tmp-12",
                           "step-00000007.old-0123456789abcdef0123456789abcdef",
                           "step-7.tmp-0123456789abcdef0123456789abcdef",
                           "notes.tmp-0123456789abcdef0123456789abcdef"})
    CHECK_FALSE(is_temporary_name(name));
  CHECK(shard_file_name(3) == "rank-00003.safetensors");
  CHECK(is_checkpoint_file_name("rank-00003.safetensors"));
  CHECK(is_checkpoint_file_name("manifest.json"));
  CHECK_FALSE(is_checkpoint_file_name("rank-3.safetensors"));
  CHECK_FALSE(is_checkpoint_file_name("notes.txt"));
}

TEST_CASE("store: what was saved is the latest, whole", "[store]") {
  const ScratchFolder folder;
  CheckpointStore store(folder / "run/checkpoints", 3);
  CHECK(latest_step(store) == -1);
  CHECK(store.list().checkpoints.empty());
  const std::string path = save_tiny(store, 10);
  CHECK(path == folder / "run/checkpoints/step-00000010");
  CHECK(names_in(path) == std::vector<std::string>{"manifest.json", "rank-00000.safetensors"});
  CHECK(names_in(folder / "run/checkpoints") == std::vector<std::string>{"step-00000010"});
  save_tiny(store, 20);

  CheckpointStore reader(folder / "run/checkpoints", 3);
  const auto latest = reader.latest({});
  REQUIRE(latest.has_value());
  CHECK(TinyState(20).equals(latest->path));
  CHECK_FALSE(TinyState(10).equals(latest->path));
  CHECK(TinyState(10).equals(path));
  CHECK(latest->manifest.meta.counters.at("tokens") == 20 * 4096);
  CHECK_THAT(latest->manifest.created, Contains("T") && Contains("Z"));
}

TEST_CASE("store: a damaged checkpoint is named and the one before taken", "[store]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 5);
  save_tiny(store, 10);
  const std::string second = save_tiny(store, 20), third = save_tiny(store, 30),
                    fourth = save_tiny(store, 40);
  std::filesystem::remove(second + "/manifest.json");
  std::filesystem::remove(third + "/rank-00000.safetensors");
  const CheckpointReader reader(fourth);
  const SafetensorsReader shard(fourth + "/rank-00000.safetensors");
  flip_byte(shard.path(), static_cast<size_t>(shard.at("layers.0.w").offset));

  std::vector<std::string> rejected;
  CHECK(latest_step(store, &rejected) == 10);
  REQUIRE(rejected.size() == 3);
  CHECK_THAT(
      rejected[0],
      Contains("step-00000040: rank-00000.safetensors: xxh3 mismatch at tensor 'layers.0.w'"));
  CHECK_THAT(rejected[1],
             Contains("step-00000030: rank-00000.safetensors: ") && Contains("No such file"));
  CHECK_THAT(rejected[2], Contains("step-00000020: ") && Contains("manifest.json"));
  for (const std::string& line : rejected) CHECK(line.find('\n') == line.npos);
}

TEST_CASE("store: all checkpoints damaged is an error that lists them", "[store]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 5);
  for (const int64_t step : {10, 20}) flip_byte(save_tiny(store, step) + "/manifest.json", 50);
  CHECK_THROWS_AS(store.latest({}), DataError);
  CHECK_THROWS_WITH(store.latest({}), Contains("step-00000010: ") && Contains("step-00000020: ") &&
                                          Contains("--overwrite"));
}

TEST_CASE("store: a checkpoint under the name of another step is refused", "[store]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 5);
  const std::string path = save_tiny(store, 10);
  std::filesystem::rename(path, folder / "step-00000030");
  CHECK_THROWS_WITH(store.latest({}),
                    Contains("manifest of step 10, but its folder is of step 30"));
  // Under a name of somebody's own it is what it says.
  std::filesystem::rename(folder / "step-00000030", folder / "best");
  CHECK(check_checkpoint(folder / "best", CheckDepth::contents).ok());
}

TEST_CASE("store: retention keeps N, at least two that verify, and what is not ours", "[store]") {
  const ScratchFolder folder;
  const auto steps = [&](const CheckpointStore& store) {
    std::vector<int64_t> out;
    for (const StoredCheckpoint& checkpoint : store.list().checkpoints)
      out.push_back(checkpoint.step);
    return out;
  };
  using Steps = std::vector<int64_t>;

  SECTION("N newest") {
    CheckpointStore store(folder.path(), 3);
    for (int64_t step = 10; step <= 60; step += 10) save_tiny(store, step);
    CHECK(steps(store) == Steps{60, 50, 40});
    CHECK(names_in(folder.path()).size() == 3);
  }
  SECTION("two even with N = 1") {
    CheckpointStore store(folder.path(), 1);
    for (int64_t step = 10; step <= 40; step += 10) save_tiny(store, step);
    CHECK(steps(store) == Steps{40, 30});
  }
  SECTION("damaged ones do not count as verified") {
    std::string damaged;
    {
      CheckpointStore before(folder.path(), 9);
      for (int64_t step = 10; step <= 40; step += 10) damaged = save_tiny(before, step);
    }
    flip_byte(damaged + "/rank-00000.safetensors", 400);
    CheckpointStore store(folder.path(), 1);
    save_tiny(store, 50);
    CHECK(steps(store) == Steps{50, 40, 30});  // 40 is not whole, so 30 stays
    save_tiny(store, 60);
    CHECK(steps(store) == Steps{60, 50});
  }
  SECTION("damage after the save is noticed by size") {
    CheckpointStore store(folder.path(), 1);
    save_tiny(store, 10);
    const std::string path = save_tiny(store, 20);
    std::filesystem::resize_file(path + "/rank-00000.safetensors", 100);
    save_tiny(store, 30);
    CHECK(steps(store) == Steps{30, 20, 10});
  }
  SECTION("nothing goes while fewer than two verify") {
    CheckpointStore store(folder.path(), 1);
    for (int64_t step = 10; step <= 30; step += 10) save_tiny(store, step);
    for (const StoredCheckpoint& checkpoint : store.list().checkpoints)
      flip_byte(checkpoint.path + "/manifest.json", 9);
    CHECK(store.apply_retention().removed.empty());
  }
  SECTION("foreign files and folders stay") {
    CheckpointStore store(folder.path(), 1);
    for (int64_t step = 10; step <= 30; step += 10) {
      const std::string path = save_tiny(store, step);
      if (step == 10) write_bytes(path + "/notes.txt", "mine");
    }
    std::filesystem::create_directory(folder / "step-00000001");  // our name, no manifest
    write_bytes(folder / "step-00000002", "a file");
    std::filesystem::create_directory(folder / "notes");
    std::filesystem::create_directory_symlink(folder / "notes", folder / "step-00000003");
    save_tiny(store, 40);
    CHECK(steps(store) == Steps{40, 30, 10, 1});
    const RetentionReport report = store.apply_retention();
    CHECK(report.removed.empty());
    CHECK(report.left ==
          std::vector<std::string>{folder / "step-00000010", folder / "step-00000001"});
    CHECK(store.list().unknown == std::vector<std::string>{folder / "notes",
                                                           folder / "step-00000002",
                                                           folder / "step-00000003"});
    CHECK(read_bytes(folder / "step-00000010/notes.txt") == "mine");
  }
}

TEST_CASE("store: a step that is saved again takes the place of the old one", "[store]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  save_tiny(store, 10);
  const std::string path = save_tiny(store, 20);
  flip_byte(path + "/rank-00000.safetensors", 300);
  CHECK(latest_step(store) == 10);
  CHECK(save_tiny(store, 20) == path);
  CHECK(latest_step(store) == 20);
  CHECK(names_in(folder.path()).size() == 2);
  // What is not ours is not replaced.
  write_bytes(path + "/notes.txt", "mine");
  CHECK_THROWS_WITH(save_tiny(store, 20), Contains("not this program's"));
  CHECK(latest_step(store) == 20);
  write_bytes(folder / "step-00000030", "a file");
  CHECK_THROWS_AS(save_tiny(store, 30), StorageError);
  CHECK(names_in(folder.path()).size() == 3);
}

TEST_CASE("store: what dead saves left goes when the run starts again", "[store]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  save_tiny(store, 10);
  const SaveAttempt attempt = store.begin(20), foreign = store.begin(30);
  const TinyState tiny(20);
  store.write_shard(attempt, 0, tiny.state());
  write_bytes(foreign.folder + "/notes.txt", "mine");
  CHECK(store.list().leftovers.size() == 2);
  CHECK(latest_step(store) == 10);
  const RunLock lock(folder.path());
  CHECK(store.remove_leftovers(lock) == std::vector<std::string>{attempt.folder});
  CHECK(store.list().leftovers == std::vector<std::string>{foreign.folder});
}

TEST_CASE("store: a new start removes all checkpoints, or none", "[store]") {
  const ScratchFolder folder, lock_folder;
  const RunLock lock(lock_folder.path());
  CheckpointStore store(folder / "checkpoints", 5);
  store.remove_all(lock);
  for (int64_t step = 10; step <= 30; step += 10) save_tiny(store, step);
  const std::string notes = folder / "checkpoints/step-00000010/notes.txt";
  write_bytes(notes, "mine");
  CHECK_THROWS_AS(store.remove_all(lock), StorageError);
  CHECK(store.list().checkpoints.size() == 3);
  std::filesystem::remove(notes);
  store.remove_all(lock);
  CHECK(names_in(folder / "checkpoints").empty());
  CHECK(latest_step(store) == -1);
}

TEST_CASE("store: a save by several ranks, and one that fails", "[store]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  const TinyState tiny(10);
  const std::vector<StateTensor> state = tiny.state();
  const SaveAttempt attempt = store.begin(10);
  std::vector<ShardInfo> shards;
  for (size_t rank = 0; rank < state.size(); ++rank)
    shards.push_back(store.write_shard(attempt, static_cast<int64_t>(rank), {&state[rank], 1}));
  const std::string path = store.commit(attempt, shards, tiny.meta());
  CHECK(tiny.equals(path));
  CHECK(names_in(path).size() == state.size() + 1);
  CHECK(check_checkpoint(path, CheckDepth::contents).ok());

  // A rank that forgot half of a tensor.
  const SaveAttempt second = store.begin(20);
  StateTensor half = state[0];
  half.extent[0] /= 2;
  const ShardInfo shard = store.write_shard(second, 0, {&half, 1});
  CHECK_THROWS_WITH(store.commit(second, {&shard, 1}, TinyState(20).meta()),
                    Contains("hold 64 of its 128 elements"));
  store.abandon(second);
  CHECK(names_in(folder.path()) == std::vector<std::string>{"step-00000010"});
  // Two ranks that wrote the same file name, or the same tensor twice.
  const SaveAttempt third = store.begin(30);
  const ShardInfo a = store.write_shard(third, 0, {&state[0], 1});
  CHECK_THROWS_AS(store.write_shard(third, 0, {&state[1], 1}), StorageError);
  const std::vector<ShardInfo> twice = {a, a};
  CHECK_THROWS_WITH(store.commit(third, twice, TinyState(30).meta()), Contains("overlap"));
  store.abandon(third);
  CHECK(latest_step(store) == 10);
}

TEST_CASE("store: the folder may vanish under the run", "[store]") {
  const ScratchFolder folder;
  CheckpointStore store(folder / "checkpoints", 3);
  save_tiny(store, 10);
  std::filesystem::remove_all(folder / "checkpoints");
  save_tiny(store, 20);
  CHECK(latest_step(store) == 20);
  const SaveAttempt attempt = store.begin(30);
  std::filesystem::remove_all(folder / "checkpoints");
  const TinyState tiny(30);
  CHECK_THROWS_AS(store.write_shard(attempt, 0, tiny.state()), NotFoundError);
  store.abandon(attempt);
}

TEST_CASE("store: no link out of a checkpoint is followed", "[store]") {
  const ScratchFolder folder;
  CheckpointStore store(folder / "checkpoints", 3);
  const std::string path = save_tiny(store, 10), shard = path + "/rank-00000.safetensors";
  std::filesystem::rename(shard, folder / "elsewhere");
  std::filesystem::create_symlink(folder / "elsewhere", shard);
  CHECK_THROWS_WITH(store.latest({}), Contains("symbolic link"));
  std::filesystem::remove(shard);
  std::filesystem::rename(folder / "elsewhere", shard);
  CHECK(latest_step(store) == 10);
  std::filesystem::rename(path + "/manifest.json", folder / "elsewhere");
  std::filesystem::create_symlink(folder / "elsewhere", path + "/manifest.json");
  CHECK_THROWS_WITH(store.latest({}), Contains("symbolic link"));
}

}  // namespace dstrain
