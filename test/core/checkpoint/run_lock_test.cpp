#include "core/checkpoint/run_lock.h"

#include <grp.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>

#include "core/base/error.h"
#include "core/base/log.h"
#include "test/core/checkpoint/checkpoint_fixture.h"
#include "test/support/io_faults.h"

namespace dstrain {
namespace {

using Catch::Contains;
using checkpoint_test::exit_code;
using checkpoint_test::read_bytes;
using checkpoint_test::run_in_child;
using checkpoint_test::ScratchFolder;
using checkpoint_test::write_bytes;

// 0 if locking is refused with all these parts in the text.
int refused_with(const std::string& folder, const std::vector<std::string>& parts) {
  try {
    const RunLock lock(folder);
    return 1;
  } catch (const RuntimeFailure& failure) {
    for (const std::string& part : parts)
      if (std::string(failure.what()).find(part) == std::string::npos) return 2;
    return 0;
  }
}

}  // namespace

TEST_CASE("run_lock: a second process is refused and told who holds the folder", "[run_lock]") {
  const ScratchFolder folder;
  {
    const RunLock lock(folder.path());
    const std::string pid = "process " + std::to_string(::getpid());
    CHECK_THAT(read_bytes(folder / "run.lock"),
               Contains(pid) && Contains("on host") && Contains("started 20"));
    CHECK(exit_code(run_in_child([&] {
            return refused_with(folder.path(), {pid, "in use", folder.path()});
          })) == 0);
    CHECK(refused_with(folder.path(), {pid}) == 0);  // also within one process
  }
  CHECK(read_bytes(folder / "run.lock").empty());
  const RunLock again(folder.path());
}

TEST_CASE("run_lock: the lock of a dead process is taken over with a warning", "[run_lock]") {
  const ScratchFolder folder;
  const int status = run_in_child([&] {
    const RunLock lock(folder.path());
    ::kill(::getpid(), SIGKILL);
    return 0;
  });
  CHECK(WIFSIGNALED(status));
  CHECK_FALSE(read_bytes(folder / "run.lock").empty());
  // The warning goes to standard error; the child's is read back.
  const std::string log = folder / "log";
  const int second = run_in_child([&] {
    if (::freopen(log.c_str(), "w", stderr) == nullptr) return 90;
    const RunLock lock(folder.path());
    return 0;
  });
  CHECK(exit_code(second) == 0);
  CHECK_THAT(read_bytes(log), Contains("ended without releasing it") && Contains("process "));
}

TEST_CASE("run_lock: the run and its ranks are held apart, and of ranks nothing is told",
          "[run_lock]") {
  const ScratchFolder folder;
  const int status = run_in_child([&] {
    const RunLock ranks(folder.path(), RunLock::Part::ranks);
    ::kill(::getpid(), SIGKILL);
    return 0;
  });
  CHECK(WIFSIGNALED(status));
  CHECK_FALSE(read_bytes(folder / "ranks.lock").empty());
  std::string log;
  set_log_writer([&](std::string_view line) { log += line; });
  {
    const RunLock run(folder.path());
    const RunLock ranks(folder.path(), RunLock::Part::ranks);
    CHECK_THROWS_WITH(RunLock(folder.path(), RunLock::Part::ranks), Contains("is in use by"));
  }
  set_log_writer({});
  CHECK(log.empty());
}

// Without a flush other hosts of a network file system find the file empty for half a minute.
TEST_CASE("run_lock: who holds it is flushed, and held even where that fails", "[run_lock]") {
  const ScratchFolder folder;
  const IoFaults flush_fails({folder.path(), "fsync", 1, EIO, true});
  const RunLock lock(folder.path());
  CHECK(flush_fails.failed() == 1);
  CHECK(refused_with(folder.path(), {"process " + std::to_string(::getpid())}) == 0);
}

TEST_CASE("run_lock: a lock file is not followed out of the folder, nor trusted", "[run_lock]") {
  const ScratchFolder folder;
  write_bytes(folder / "target", "precious");
  std::filesystem::create_symlink(folder / "target", folder / "run.lock");
  CHECK_THROWS_WITH(RunLock(folder.path()), Contains("symbolic link"));
  CHECK(read_bytes(folder / "target") == "precious");
  std::filesystem::remove(folder / "run.lock");
  write_bytes(folder / "run.lock", std::string("\x1b[31mred\n\0x", 11) + std::string(100000, 'y'));
  const RunLock lock(folder.path());
  CHECK(read_bytes(folder / "run.lock").size() < 200);
}

TEST_CASE("run folder: what cannot hold a run is refused before it starts", "[run_lock]") {
  const ScratchFolder folder;
  CHECK_NOTHROW(prepare_run_folder(folder / "a/b c/\xff"));
  CHECK(std::filesystem::is_directory(folder / "a/b c/\xff"));
  CHECK_NOTHROW(prepare_run_folder(folder / "a/b c/\xff/"));
  CHECK(checkpoint_test::names_in(folder / "a/b c/\xff").empty());

  write_bytes(folder / "file", "");
  std::filesystem::create_symlink(folder / "absent", folder / "dangling");
  std::filesystem::create_directory_symlink(folder / "a", folder / "link");
  CHECK_THROWS_AS(prepare_run_folder(folder / "file"), ConfigError);
  CHECK_THROWS_WITH(prepare_run_folder(folder / "file"), Contains("is a file"));
  CHECK_THROWS_WITH(prepare_run_folder(folder / "file/run"), Contains("is a file"));
  CHECK_THROWS_WITH(prepare_run_folder(folder / "dangling"), Contains("symbolic link to nothing"));
  CHECK_THROWS_WITH(prepare_run_folder(folder / "dangling/run"),
                    Contains("symbolic link to nothing"));
  CHECK_THROWS_WITH(prepare_run_folder(""), Contains("run.name"));
  CHECK_NOTHROW(prepare_run_folder(folder / "link/run"));
  CHECK_NOTHROW(prepare_run_folder(folder / std::string(255, 'n')));
  CHECK_THROWS_WITH(prepare_run_folder(folder / std::string(256, 'n')),
                    Contains("more than 255 bytes"));
}

TEST_CASE("run folder: a check makes nothing and refuses the same", "[run_lock]") {
  const ScratchFolder folder;
  CHECK_NOTHROW(check_run_folder(folder / "a/b"));
  CHECK_FALSE(std::filesystem::exists(folder / "a"));
  write_bytes(folder / "file", "");
  CHECK_THROWS_WITH(check_run_folder(folder / "file/run"), Contains("is a file"));
  CHECK_THROWS_WITH(check_run_folder(""), Contains("run.name"));
}

TEST_CASE("run lock: a folder that is given up loses the lock's file too", "[run_lock]") {
  const ScratchFolder folder;
  {
    RunLock lock(folder.path());
    CHECK(checkpoint_test::names_in(folder.path()).size() == 1);
    lock.remove_file();
  }
  CHECK(checkpoint_test::names_in(folder.path()).empty());
  CHECK_NOTHROW(RunLock(folder.path()));
}

TEST_CASE("run folder: without permission the text names the path and the user", "[run_lock]") {
  const ScratchFolder folder;
  const std::string closed = folder / "closed";
  std::filesystem::create_directory(closed);
  REQUIRE(::chmod(folder.path().c_str(), 0755) == 0);
  REQUIRE(::chmod(closed.c_str(), 0555) == 0);
  const int status = run_in_child([&] {
    // Root may write anywhere, so the child becomes nobody.
    if (::geteuid() == 0 && (::setgroups(0, nullptr) != 0 || ::setuid(65534) != 0)) return 90;
    for (const std::string& path : {closed, closed + "/run"})
      for (const auto refuse : {prepare_run_folder, check_run_folder}) try {
          refuse(path);
          return 91;
        } catch (const PermissionError& error) {
          const std::string text = error.what();
          if (text.find(path) == text.npos ||
              text.find("uid " + std::to_string(::geteuid())) == text.npos)
            return 92;
        }
    return 0;
  });
  CHECK(exit_code(status) == 0);
}

TEST_CASE("run folder: a read-only file system is a matter of permission", "[run_lock]") {
  const ScratchFolder folder;
  if (::mount("none", folder.path().c_str(), "tmpfs", MS_RDONLY, "size=1m") != 0) {
    checkpoint_test::report_skipped("mounting a tmpfs is not permitted here");
    return;
  }
  CHECK_THROWS_AS(prepare_run_folder(folder.path()), PermissionError);
  CHECK_THROWS_WITH(prepare_run_folder(folder / "run"), Contains("Read-only file system"));
  CHECK_THROWS_WITH(check_run_folder(folder / "run/a"), Contains("Read-only file system"));
  CHECK(::umount2(folder.path().c_str(), MNT_DETACH) == 0);
}

}  // namespace dstrain
