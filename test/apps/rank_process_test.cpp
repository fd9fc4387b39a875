#include "apps/rank_process.h"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <map>
#include <thread>

#include "apps/launch_variables.h"
#include "test/support/catch.h"
#include "test/support/run_program.h"

namespace dstrain {
namespace {

using Catch::Contains;
using Table = std::map<std::string, std::string>;

Variables in(const Table& table) {
  return [&table](const char* name) {
    const auto at = table.find(name);
    return at == table.end() ? nullptr : at->second.c_str();
  };
}

const RankEnvironment kSecond{.rank = 5, .size = 8, .local_rank = 1, .local_size = 4};

}  // namespace

TEST_CASE("rank_process: a stuck rank says where it is and ends, and the board shows it",
          "[launch]") {
  const test::TempFolder folder;
  const RankBoard board = RankBoard::create(folder / "ranks", 4);
  const Table table = {{kBoardVariable, folder / "ranks"}};
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    if (std::freopen((folder / "err").c_str(), "w", stderr) == nullptr) ::_exit(100);
    init_log(log_options_of(kSecond, {}));
    RankProcess rank(kSecond, 0.3, in(table));
    rank.progress().enter(RankPhase::reducing, 812);
    std::this_thread::sleep_for(std::chrono::seconds(20));
    ::_exit(101);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 1);
  CHECK_THAT(test::read_file(folder / "err"),
             Contains("rank 5: error: no progress within launch.hang_timeout (0.3 s): step 812, "
                      "summing gradients for 0 s\n"));
  REQUIRE(board.states().size() == 1);
  CHECK(board.states()[0].rank == 5);
  CHECK(board.states()[0].step == 812);
  CHECK(board.states()[0].is_stuck);
}

TEST_CASE("rank_process: a rank's own failure is on the board, with its code", "[launch]") {
  const test::TempFolder folder;
  const RankBoard board = RankBoard::create(folder / "ranks", 4);
  const Table table = {{kBoardVariable, folder / "ranks"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}};
  RankProcess rank(kSecond, 0, in(table));
  rank.progress().enter(RankPhase::saving, 812);
  REQUIRE(board.states().size() == 1);
  CHECK_FALSE(board.states()[0].failure);
  const int64_t before = monotonic_ns();
  tell_failure(in(table), 74);
  const RankState state = board.states()[0];
  CHECK(state.failure == 74);
  CHECK_FALSE(state.is_stuck);
  CHECK(state.step == 812);
  CHECK(state.entered_ns >= before);
  for (const Table& other :
       {Table{}, Table{{kBoardVariable, folder / "none"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "0"}},
        Table{{kBoardVariable, folder / "ranks"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "4"}},
        Table{{kBoardVariable, folder / "ranks"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "-1"}}})
    tell_failure(in(other), 1);
  CHECK(board.states().size() == 1);
}

TEST_CASE("rank_process: works without a board, as on other hosts", "[launch]") {
  const Table table = {{kBoardVariable, "/no/such/file"}};
  RankProcess rank(kSecond, 0, in(table));
  rank.progress().enter(RankPhase::saving, 7);
  CHECK(rank.progress().state().step == 7);
  // One with fewer slots than this host has ranks is as good as none.
  const test::TempFolder folder;
  RankBoard::create(folder / "ranks", 1);
  const Table small = {{kBoardVariable, folder / "ranks"}};
  RankProcess(kSecond, 0, in(small)).progress().enter(RankPhase::saving, 7);
}

TEST_CASE("rank_process: rank 0 logs as asked, the others from warnings up", "[launch]") {
  const LogOptions options{.level = LogLevel::info, .color = true};
  CHECK(log_options_of(RankEnvironment{}, options).level == LogLevel::info);
  CHECK(log_options_of(RankEnvironment{}, options).rank == 0);
  CHECK(log_options_of(kSecond, options).level == LogLevel::warning);
  CHECK(log_options_of(kSecond, options).rank == 5);
  CHECK(log_options_of(kSecond, options).world_size == 8);
  CHECK(log_options_of(kSecond, options).color);
  CHECK(log_options_of(kSecond, {.level = LogLevel::error}).level == LogLevel::error);
}

TEST_CASE("rank_process: the terminal behind the launcher", "[launch]") {
  CHECK(launcher_columns(in({{kColumnsVariable, "132"}})) == 132);
  CHECK_FALSE(launcher_columns(in({})));
  for (const char* text : {"", "0", "-3", "wide", "80x"})
    CHECK_FALSE(launcher_columns(in({{kColumnsVariable, text}})));
}

TEST_CASE("rank_process: rank 0 and whoever failed first report before the others", "[launch]") {
  // What it says, and how often it looked whether the job has ended: at equal times.
  const auto waited = [](const Table& table, bool is_peer_failure) {
    int looks = 0;
    const auto look = [&] { return ++looks < 0; };
    const std::string prefix = failing_rank_prefix(in(table), is_peer_failure, look).value();
    return std::pair(prefix, looks);
  };
  const Table first = {{"OMPI_COMM_WORLD_RANK", "0"}}, third = {{"OMPI_COMM_WORLD_RANK", "3"}};
  CHECK(waited({}, true) == std::pair(std::string(), 0));
  CHECK(waited(first, false) == std::pair(std::string(), 0));
  const int64_t begin = monotonic_ns();
  const auto [prefix, looks] = waited(third, false);
  CHECK(prefix == "rank 3: ");
  CHECK(looks > 0);
  CHECK(monotonic_ns() - begin > 200'000'000);
  CHECK(waited({{"SLURM_PROCID", "3"}}, false) == std::pair(std::string("rank 3: "), looks));
  CHECK(waited(first, true).second > looks);
  // The job ends while a rank waits: another one has said it.
  int left = 3;
  CHECK_FALSE(failing_rank_prefix(in(third), false, [&] { return --left == 0; }));
}

}  // namespace dstrain
