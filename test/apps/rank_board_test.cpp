#include "apps/rank_board.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <iterator>
#include <thread>
#include <vector>

#include "core/base/error.h"
#include "test/support/catch.h"
#include "test/support/run_program.h"

namespace dstrain {
namespace {

namespace fs = std::filesystem;
using test::TempFolder;

}  // namespace

TEST_CASE("rank_board: what a rank writes in its process is read in another", "[launch]") {
  const TempFolder folder;
  const RankBoard board = RankBoard::create(folder / "ranks", 3);
  CHECK(board.states().empty());
  const pid_t child = ::fork();
  if (child == 0) {
    std::optional<RankBoard> there = RankBoard::open(folder / "ranks");
    if (!there || there->slots().size() != 3) ::_exit(1);
    RankProgress progress;
    progress.share(there->slots()[1], 5);
    progress.enter(RankPhase::reducing, int64_t{1} << 40);
    ::_exit(0);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(status == 0);
  const std::vector<RankState> states = board.states();
  REQUIRE(states.size() == 1);
  CHECK(states[0].rank == 5);
  CHECK(states[0].pid == child);
  CHECK(states[0].phase == RankPhase::reducing);
  CHECK(states[0].step == int64_t{1} << 40);
  CHECK(states[0].seconds >= 0);
  CHECK(states[0].seconds < 60);
}

TEST_CASE("rank_board: what is no board is left alone", "[launch]") {
  const TempFolder folder;
  CHECK_FALSE(RankBoard::open(folder / "none"));
  CHECK_FALSE(RankBoard::open(folder.path()));
  test::write_file(folder / "empty", "");
  CHECK_FALSE(RankBoard::open(folder / "empty"));
  test::write_file(folder / "odd", std::string(33, 'x'));
  CHECK_FALSE(RankBoard::open(folder / "odd"));
  RankBoard::create(folder / "ranks", 1);
  fs::create_symlink(folder / "ranks", folder / "link");
  CHECK_FALSE(RankBoard::open(folder / "link"));
  CHECK_THROWS_AS(RankBoard::create(folder / "ranks", 1), StorageError);
  CHECK_THROWS_AS(RankBoard::create(folder / "no/folder", 1), NotFoundError);
}

TEST_CASE("session_folder: goes with its owner, takes abandoned ones along", "[launch]") {
  const TempFolder base, other;
  const auto make_left = [](const std::string& path) {
    fs::create_directory(path);
    test::write_file(path + "/file", "x");
  };
  make_left(base / "dstrain-launch-left");
  make_left(base / "other");
  make_left(other / "dstrain-launch-left");
  fs::create_directory_symlink(base / "other", base / "dstrain-launch-link");
  std::string path;
  {
    const SessionFolder session(0, {base.path(), other.path()});
    path = session.path();
    CHECK_THAT(path, Catch::StartsWith(base.path()));
    CHECK(fs::is_directory(path));
    CHECK_FALSE(fs::exists(base / "dstrain-launch-left"));
    CHECK_FALSE(fs::exists(other / "dstrain-launch-left"));
    CHECK(fs::exists(base / "other/file"));
    // One in use stays.
    const SessionFolder second(0, {base.path()});
    CHECK(fs::exists(path));
    CHECK(second.path() != path);
  }
  CHECK_FALSE(fs::exists(path));
  // Without room in the first the last is taken.
  const SessionFolder session(int64_t{1} << 60, {base.path(), other.path()});
  CHECK_THAT(session.path(), Catch::StartsWith(other.path()));
}

TEST_CASE("session_folder: of a killed process the next one removes, with what is in it",
          "[launch]") {
  const TempFolder base;
  int ready[2];
  REQUIRE(::pipe(ready) == 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const SessionFolder session(0, {base.path()});
    RankBoard::create(session.path() + "/ranks", 2);
    char done = 0;
    if (::write(ready[1], &done, 1) == 1) ::pause();
    ::_exit(1);
  }
  char done = 1;
  REQUIRE(::read(ready[0], &done, 1) == 1);
  const auto folders = [&] {
    return std::distance(fs::directory_iterator(base.path()), fs::directory_iterator());
  };
  {
    const SessionFolder beside(0, {base.path()});
    CHECK(folders() == 2);
  }
  REQUIRE(::kill(child, SIGKILL) == 0);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  CHECK(folders() == 1);
  const SessionFolder next(0, {base.path()});
  CHECK(folders() == 1);
  CHECK(fs::exists(next.path()));
  for (const int fd : ready) ::close(fd);
}

TEST_CASE("session_folder: launchers that start at once leave each other's alone", "[launch]") {
  const TempFolder base;
  std::atomic<int> missing = 0;
  std::vector<std::thread> launchers;
  for (int i = 0; i < 4; ++i)
    launchers.emplace_back([&] {
      for (int start = 0; start < 1000; ++start) {
        const SessionFolder session(0, {base.path()});
        if (!fs::is_directory(session.path())) ++missing;
        std::this_thread::yield();
        if (!fs::is_directory(session.path())) ++missing;
      }
    });
  for (std::thread& launcher : launchers) launcher.join();
  CHECK(missing == 0);
  CHECK(fs::is_empty(base.path()));
}

}  // namespace dstrain
