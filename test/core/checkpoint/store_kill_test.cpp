// A child is killed at every failpoint of saving, retention and restoring. Whatever it had
// committed before must be there, whole, and the next run must go on.
#include <unistd.h>

#include <csignal>

#include "core/base/error.h"
#include "core/checkpoint/async_saver.h"
#include "core/checkpoint/failpoint.h"
#include "core/checkpoint/store.h"
#include "test/core/checkpoint/checkpoint_fixture.h"

namespace dstrain {

using Catch::Contains;
using checkpoint_test::exit_code;
using checkpoint_test::names_in;
using checkpoint_test::run_in_child;
using checkpoint_test::save_tiny;
using checkpoint_test::ScratchFolder;
using checkpoint_test::TinyState;

TEST_CASE("failpoint: specs are checked", "[failpoint]") {
  CHECK_NOTHROW(configure_failpoints(""));
#ifdef DSTRAIN_FAILPOINTS
  CHECK_NOTHROW(configure_failpoints("save.after_rename@2=sleep:1,restore.before_scan=throw"));
  CHECK_THROWS_WITH(failpoint_reached("restore.before_scan"), Contains("restore.before_scan"));
  CHECK_NOTHROW(failpoint_reached("save.after_rename"));
  configure_failpoints("");
  CHECK_NOTHROW(failpoint_reached("restore.before_scan"));
  for (const char* spec :
       {"save.after_rename", "nowhere=kill", "save.after_rename=explode",
        "save.after_rename@0=kill", "save.after_rename@x=kill", "save.after_rename=sleep:", ","})
    CHECK_THROWS_AS(configure_failpoints(spec), UsageError);
  CHECK_THROWS_WITH(configure_failpoints("nowhere=kill"), Contains("save.after_manifest_fsync"));
#else
  CHECK_THROWS_WITH(configure_failpoints("save.after_rename=kill"), Contains("DSTRAIN_FAILPOINTS"));
#endif
}

#ifdef DSTRAIN_FAILPOINTS

namespace {

// Passes every failpoint: saves with retention, a step saved twice, a save that fails, one in the
// background, and a restore. Writes each committed step to `acks`.
int run_job(const std::string& folder, int acks) {
  CheckpointStore store(folder, /*keep=*/1);
  const auto acknowledge = [&](int64_t step) {
    if (::write(acks, &step, sizeof step) != sizeof step) ::_exit(98);
  };
  for (const int64_t step : {30, 40, 40}) {
    save_tiny(store, step);
    acknowledge(step);
  }
  const TinyState broken(50), tiny(60);
  std::vector<StateTensor> state = broken.state();
  state[0].global_shape[0] += 1;  // not covered, so the save fails and is abandoned
  try {
    store.save(broken.meta(), state);
    return 97;
  } catch (const DataError&) {
  }
  {
    const std::vector<StateTensor> all = tiny.state();
    std::vector<std::byte> snapshot(static_cast<size_t>(AsyncSaver::snapshot_bytes(all)));
    AsyncSaver saver(store, snapshot);
    saver.request(tiny.meta(), all);
    saver.wait();
    if (!saver.poll()->ok) return 96;
  }
  acknowledge(60);
  const auto latest = store.latest({});
  return latest && tiny.equals(latest->path) ? 0 : 95;
}

struct Trial {
  int status = 0;
  int64_t acknowledged = 0;  // the newest step that the child saw committed
};

Trial run_killed(const std::string& folder, const std::string& failpoint) {
  int acks[2];
  REQUIRE(::pipe(acks) == 0);
  Trial trial{0, 20};
  trial.status = run_in_child([&] {
    configure_failpoints(failpoint);
    return run_job(folder, acks[1]);
  });
  ::close(acks[1]);
  int64_t step = 0;
  while (::read(acks[0], &step, sizeof step) == sizeof step) trial.acknowledged = step;
  ::close(acks[0]);
  return trial;
}

// What a run that starts after the kill finds and does.
void check_recovery(const std::string& folder, int64_t acknowledged) {
  CheckpointStore store(folder, /*keep=*/1);
  std::vector<std::string> rejected;
  const auto latest = store.latest([&](const std::string& line) { rejected.push_back(line); });
  REQUIRE(latest.has_value());
  CHECK(rejected.empty());  // nothing half-made under a final name
  CHECK(latest->manifest.meta.step >= acknowledged);
  CHECK(TinyState(latest->manifest.meta.step).equals(latest->path));
  {
    const ScratchFolder lock_folder;
    const RunLock lock(lock_folder.path());
    store.remove_leftovers(lock);
  }
  save_tiny(store, 70);
  CHECK(TinyState(70).equals(store.latest({})->path));
  const StoreListing listing = store.list();
  CHECK(listing.checkpoints.size() == 2);
  CHECK(listing.leftovers.empty());
  CHECK(listing.unknown.empty());
}

}  // namespace

TEST_CASE("kill: at every failpoint what was committed stays whole", "[store][kill]") {
  int kills = 0;
  for (const std::string_view name : kFailpointNames) {
    for (int nth = 1; nth <= 12; ++nth) {
      const std::string spec = std::string(name) + "@" + std::to_string(nth) + "=kill";
      CAPTURE(spec);
      const ScratchFolder folder;
      {
        CheckpointStore store(folder.path(), /*keep=*/2);
        save_tiny(store, 10);
        save_tiny(store, 20);
      }
      const Trial trial = run_killed(folder.path(), spec);
      const bool killed = WIFSIGNALED(trial.status) && WTERMSIG(trial.status) == SIGKILL;
      if (!killed) {
        CHECK(exit_code(trial.status) == 0);
        CHECK(nth > 1);  // the job passes every failpoint at least once
        break;
      }
      ++kills;
      check_recovery(folder.path(), trial.acknowledged);
    }
  }
  CHECK(kills > 100);
}

TEST_CASE("kill: an error at every failpoint of a save loses that save only", "[store][kill]") {
  for (const std::string_view name : kFailpointNames) {
    if (!name.starts_with("save.")) continue;
    CAPTURE(name);
    const ScratchFolder folder;
    CheckpointStore store(folder.path(), 2);
    save_tiny(store, 10);
    configure_failpoints(std::string(name) + "@1=throw");
    bool failed = false;
    try {
      save_tiny(store, 20);
    } catch (const StorageError& error) {
      failed = true;
      CHECK_THAT(error.what(), Contains(std::string(name)));
    }
    configure_failpoints("");
    // After the last fsync, or without a failure before it, the save counts.
    const bool committed = name == "save.after_parent_fsync" || !failed;
    CHECK(store.latest({})->manifest.meta.step == (committed ? 20 : 10));
    CHECK(store.list().leftovers.empty());
    save_tiny(store, 30);
    CHECK(store.latest({})->manifest.meta.step == 30);
  }
}

#else

TEST_CASE("kill: tests at failpoints", "[store][kill]") {
  checkpoint_test::report_skipped("configure with -DDSTRAIN_FAILPOINTS=ON");
}

#endif

}  // namespace dstrain
