#include "apps/rank_board.h"

#include <sys/file.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

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
  const TempFolder base;
  const auto make_old = [&](const std::string& name) {
    fs::create_directory(base / name);
    test::write_file(base / (name + "/file"), "x");
    const timeval times[2] = {{1'000'000'000, 0}, {1'000'000'000, 0}};
    REQUIRE(::utimes((base / name).c_str(), times) == 0);
  };
  make_old("dstrain-launch-abandoned");
  make_old("other");
  fs::create_directory(base / "dstrain-launch-young");
  std::string path;
  {
    const SessionFolder session(0, {base.path()});
    path = session.path();
    CHECK(fs::is_directory(path));
    CHECK_FALSE(fs::exists(base / "dstrain-launch-abandoned"));
    CHECK(fs::exists(base / "dstrain-launch-young"));
    CHECK(fs::exists(base / "other/file"));
    // One in use stays, however old.
    const timeval times[2] = {{1'000'000'000, 0}, {1'000'000'000, 0}};
    REQUIRE(::utimes(path.c_str(), times) == 0);
    const SessionFolder second(0, {base.path()});
    CHECK(fs::exists(path));
    CHECK(second.path() != path);
  }
  CHECK_FALSE(fs::exists(path));
  // Without room in the first the last is taken.
  const TempFolder other;
  const SessionFolder session(int64_t{1} << 60, {base.path(), other.path()});
  CHECK_THAT(session.path(), Catch::StartsWith(other.path()));
}

}  // namespace dstrain
