// Storage that fails while a checkpoint is written: single calls, full disks, slow and partial
// transfers. The checkpoint before must stay the latest, and nothing half-made may remain.
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

#include "core/base/error.h"
#include "core/checkpoint/store.h"
#include "test/core/checkpoint/checkpoint_fixture.h"
#include "test/support/io_faults.h"

namespace dstrain {
namespace {

using Catch::Contains;
using checkpoint_test::exit_code;
using checkpoint_test::names_in;
using checkpoint_test::run_in_child;
using checkpoint_test::save_tiny;
using checkpoint_test::ScratchFolder;
using checkpoint_test::TinyState;

// 3 MiB in one tensor.
class BigState {
 public:
  explicit BigState(int64_t step) : step_(step), values_(3 << 20, static_cast<uint8_t>(step)) {}
  void save(CheckpointStore& store) const {
    const auto size = static_cast<int64_t>(values_.size());
    const std::vector<StateTensor> state = {{"w", DType::u8, {size}, {0}, {size}, values_.data()}};
    store.save(TinyState(step_).meta(), state);
  }

 private:
  int64_t step_;
  std::vector<uint8_t> values_;
};

// A tmpfs of some MiB, gone at the end.
class SmallDisk {
 public:
  SmallDisk(std::string path, int mib) : path_(std::move(path)) {
    const std::string options = "size=" + std::to_string(mib) + "m";
    ok_ = ::mount("none", path_.c_str(), "tmpfs", 0, options.c_str()) == 0;
  }
  ~SmallDisk() {
    if (ok_) ::umount2(path_.c_str(), MNT_DETACH);
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  bool ok() const { return ok_; }

 private:
  std::string path_;
  bool ok_ = false;
};

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing";
}

int64_t latest_step(CheckpointStore& store) {
  const auto latest = store.latest([](const std::string& line) { FAIL("rejected: " << line); });
  return latest ? latest->manifest.meta.step : -1;
}

}  // namespace

TEST_CASE("io faults: each call of a save may fail once, or from then on", "[store][io]") {
  struct Case {
    const char* call;
    int error_number;
  };
  const Case cases[] = {{"open", EMFILE}, {"write", ENOSPC}, {"write", EIO}, {"fsync", EIO},
                        {"close", EIO},   {"mkdir", ENOSPC}, {"rename", EIO}};
  for (const Case& fault : cases) {
    for (const bool persistent : {false, true}) {
      int64_t nth = 1;
      for (;; ++nth) {
        CAPTURE(fault.call, fault.error_number, persistent, nth);
        REQUIRE(nth < 100);
        const ScratchFolder folder;
        CheckpointStore store(folder.path(), 5);
        save_tiny(store, 10);
        std::string text;
        int64_t failed = 0;
        {
          const IoFaults faults({folder.path(), fault.call, nth, fault.error_number, persistent});
          text = error_of([&] { save_tiny(store, 20); });
          failed = faults.failed();
        }
        if (failed == 0) {
          CHECK(text == "nothing");
          CHECK(latest_step(store) == 20);
          break;
        }
        const bool saved = text == "nothing";  // what failed then came after the commit
        CHECK(latest_step(store) == (saved ? 20 : 10));
        if (!saved) {
          CHECK_THAT(text, Contains(folder.path()) && Contains(std::strerror(fault.error_number)));
        }
        CHECK(store.list().leftovers.empty());
        save_tiny(store, 30);
        CHECK(latest_step(store) == 30);
        CHECK(TinyState(30).equals(store.latest({})->path));
      }
      CHECK(nth > 1);
    }
  }
}

TEST_CASE("io faults: saving a step again keeps the old one until the new one is committed",
          "[store][io]") {
  const auto save_take = [](CheckpointStore& store, int64_t take) {
    const TinyState tiny(20);
    CheckpointMeta meta = tiny.meta();
    meta.counters["take"] = take;
    store.save(meta, tiny.state());
  };
  const auto latest_take = [](CheckpointStore& store) {
    return store.latest([](const std::string& line) { FAIL("rejected: " << line); })
        ->manifest.meta.counters.at("take");
  };
  struct Case {
    const char* call;
    int error_number;
  };
  // EINVAL from the exchange of two folders: this file system cannot do that, use two renames.
  for (const Case& fault : {Case{"rename", EIO}, Case{"fsync", EIO}, Case{"rename", EINVAL}}) {
    for (int64_t nth = 1;; ++nth) {
      CAPTURE(fault.call, fault.error_number, nth);
      REQUIRE(nth < 20);
      const ScratchFolder folder;
      CheckpointStore store(folder.path(), 5);
      save_take(store, 1);
      std::string text;
      int64_t failed = 0;
      {
        const IoFaults faults({folder.path(), fault.call, nth, fault.error_number, false});
        text = error_of([&] { save_take(store, 2); });
        failed = faults.failed();
      }
      CHECK((text == "nothing") == (failed == 0 || fault.error_number == EINVAL));
      CHECK(latest_take(store) == (text == "nothing" ? 2 : 1));
      CHECK(names_in(folder.path()) == std::vector<std::string>{"step-00000020"});
      if (failed == 0) break;
    }
  }
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 5);
  save_take(store, 1);
  {
    const IoFaults faults({folder.path(), "rename", 1, EINVAL, false, false, /*also_nth=*/3});
    CHECK_THAT(error_of([&] { save_take(store, 2); }), Contains("Invalid argument"));
  }
  CHECK(latest_take(store) == 1);  // it had made room already, and went back
  CHECK(names_in(folder.path()) == std::vector<std::string>{"step-00000020"});
}

TEST_CASE("io faults: removal that fails leaves a folder that the next start removes",
          "[store][io]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 5);
  save_tiny(store, 10);
  {
    const IoFaults write_fails({folder.path(), "write", 3, ENOSPC, true});
    CHECK_THAT(error_of([&] { save_tiny(store, 20); }), Contains("No space left"));
  }
  CHECK(names_in(folder.path()) == std::vector<std::string>{"step-00000010"});
  const SaveAttempt attempt = store.begin(20);
  const TinyState tiny(20);
  store.write_shard(attempt, 0, tiny.state());
  {
    const IoFaults unlink_fails({folder.path(), "unlink", 1, EIO, true});
    store.abandon(attempt);
  }
  CHECK(store.list().leftovers.size() == 1);
  const ScratchFolder lock_folder;
  store.remove_leftovers(RunLock(lock_folder.path()));
  CHECK(store.list().leftovers.empty());
}

TEST_CASE("io faults: interrupted and partial transfers change nothing", "[store][io]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 5);
  const IoFaults disturbed({folder.path(), "", 0, 0, false, true});
  for (int64_t step = 10; step <= 60; step += 10) {
    save_tiny(store, step);
    CHECK(latest_step(store) == step);
    CHECK(TinyState(step).equals(store.latest({})->path));
  }
  CHECK(disturbed.failed() > 20);
}

TEST_CASE("io faults: a file size limit stops a save, not the run", "[store][io]") {
  const ScratchFolder folder;
  {
    CheckpointStore store(folder.path(), 5);
    BigState(10).save(store);
  }
  for (const rlim_t limit : {rlim_t{0}, rlim_t{100}, rlim_t{1} << 20, rlim_t{3} << 20}) {
    CAPTURE(limit);
    const int status = run_in_child([&] {
      std::signal(SIGXFSZ, SIG_IGN);
      const rlimit limits{limit, RLIM_INFINITY};
      if (::setrlimit(RLIMIT_FSIZE, &limits) != 0) return 90;
      CheckpointStore store(folder.path(), 5);
      try {
        BigState(20).save(store);
        return 91;
      } catch (const StorageError& error) {
        const std::string text = error.what();
        if (text.find(folder.path()) == text.npos || text.find("File too large") == text.npos)
          return 92;
      }
      if (!store.list().leftovers.empty() || store.latest({})->manifest.meta.step != 10) return 93;
      const rlimit unlimited{RLIM_INFINITY, RLIM_INFINITY};
      if (::setrlimit(RLIMIT_FSIZE, &unlimited) != 0) return 94;
      return 0;
    });
    CHECK(exit_code(status) == 0);
  }
  CheckpointStore store(folder.path(), 5);
  BigState(20).save(store);
  CHECK(latest_step(store) == 20);
}

TEST_CASE("io faults: a full disk stops a save, not the run", "[store][io]") {
  const ScratchFolder folder;
  const std::string disk = folder / "disk";
  std::filesystem::create_directory(disk);
  // From hardly any room for the second checkpoint of 3 MiB to enough.
  int failures = 0, successes = 0;
  for (const int mib : {4, 5, 6, 8}) {
    CAPTURE(mib);
    const SmallDisk mounted(disk, mib);
    if (!mounted.ok()) {
      checkpoint_test::report_skipped("mounting a tmpfs is not permitted here");
      return;
    }
    {
      CheckpointStore store(disk, 5);
      BigState(10).save(store);
      const std::string text = error_of([&] { BigState(20).save(store); });
      if (text == "nothing") {
        ++successes;
        CHECK(latest_step(store) == 20);
      } else {
        ++failures;
        CHECK_THAT(text, Contains("No space left on device") && Contains(disk));
        CHECK(names_in(disk) == std::vector<std::string>{"step-00000010"});
        CHECK(latest_step(store) == 10);
        save_tiny(store, 20);  // the space was given back
        CHECK(latest_step(store) == 20);
      }
    }
  }
  CHECK(failures == 3);
  CHECK(successes == 1);
}

}  // namespace dstrain
