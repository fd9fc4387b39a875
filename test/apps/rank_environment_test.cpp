#include "apps/rank_environment.h"

#include <map>
#include <string>

#include "apps/launch_variables.h"
#include "core/base/error.h"
#include "test/support/catch.h"

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

std::string refusal(const Table& table) {
  try {
    rank_environment(in(table));
  } catch (const UsageError& e) {
    return e.what();
  }
  return "accepted";
}

const Table kMpirun = {{"OMPI_COMM_WORLD_SIZE", "8"},
                       {"OMPI_COMM_WORLD_RANK", "5"},
                       {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                       {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                       {"PMIX_RANK", "5"}};

// The third of three nodes, which has fewer tasks than the others.
const Table kSrun = {{"SLURM_STEP_ID", "0"},          {"SLURM_PROCID", "9"},
                     {"SLURM_STEP_NUM_TASKS", "10"},  {"SLURM_LOCALID", "1"},
                     {"SLURM_NODEID", "2"},           {"SLURM_STEP_TASKS_PER_NODE", "4(x2),2"},
                     {"SLURM_CPU_BIND_TYPE", "none"}, {"PMIX_RANK", "9"}};

Table with(Table table, const std::string& name, const std::string& value) {
  table[name] = value;
  return table;
}
Table without(Table table, const std::string& name) {
  table.erase(name);
  return table;
}

}  // namespace

TEST_CASE("rank_environment: what is the work of one process is refused to several", "[launch]") {
  const auto text = [](const Table& table) -> std::string {
    try {
      require_one_process("data build", in(table));
    } catch (const UsageError& e) {
      return e.what();
    }
    return "accepted";
  };
  CHECK_THAT(text(kMpirun),
             Contains("'data build' is the work of one process, and mpirun started 8 of them") &&
                 Contains("without mpirun: deepseek-train data build"));
  CHECK_THAT(text(kSrun), Contains("srun started 10 of them"));
  CHECK_THAT(text(without(kSrun, "PMIX_RANK")), Contains("srun started 10 of them"));
  CHECK_THAT(text({{"PMI_SIZE", "3"}}), Contains("mpiexec started 3 of them"));
  CHECK(text({}) == "accepted");
  CHECK(text(with(kMpirun, "OMPI_COMM_WORLD_SIZE", "1")) == "accepted");
  CHECK(text(with(kSrun, "SLURM_STEP_NUM_TASKS", "1")) == "accepted");
  // A shell of srun --pty, which has a terminal in its first task alone.
  const Table terminal = with(kSrun, "SLURM_PTY_PORT", "33333");
  CHECK(text(with(terminal, "SLURM_PROCID", "0")) == "accepted");
  CHECK_THAT(text(terminal), Contains("srun started 10 of them"));
  // A batch script of eight tasks, which is one process.
  CHECK(text({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "8"}, {"SLURM_STEP_NUM_TASKS", "8"}}) ==
        "accepted");
}

TEST_CASE("rank_environment: a process that nobody launched is no rank", "[launch]") {
  CHECK_FALSE(rank_environment(in({})));
  // A batch script of Slurm is no task of a step; nor is a shell in an allocation.
  CHECK_FALSE(
      rank_environment(in({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "8"}, {"SLURM_NODEID", "0"}})));
  CHECK_FALSE(rank_environment(in({{"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NUM_TASKS", "1"}})));
  // Nor is srun's only task, which may have a terminal and PMIx, and may start ranks of its own;
  // several tasks in a terminal are ranks.
  const Table terminal = {{"SLURM_STEP_ID", "4294967290"},
                          {"SLURM_PROCID", "0"},
                          {"SLURM_STEP_NUM_TASKS", "1"},
                          {"SLURM_LOCALID", "0"},
                          {"SLURM_NODEID", "0"},
                          {"PMIX_RANK", "0"},
                          {"SLURM_STEP_TASKS_PER_NODE", "1"},
                          {"SLURM_PTY_PORT", "33333"}};
  CHECK_FALSE(rank_environment(in(terminal)));
  CHECK_FALSE(rank_environment(in(without(terminal, "SLURM_PTY_PORT"))));
  CHECK(rank_environment(in(with(kSrun, "SLURM_PTY_PORT", "33333")))->rank == 9);
}

TEST_CASE("rank_environment: under mpirun", "[launch]") {
  RankEnvironment expected{.rank = 5, .size = 8, .local_rank = 1, .local_size = 4};
  CHECK(rank_environment(in(kMpirun)) == expected);
  expected.is_bound = true;
  CHECK(rank_environment(in(with(kMpirun, "OMPI_MCA_orte_bound_at_launch", "1"))) == expected);
  expected = {.rank = 5, .size = 8, .local_rank = 1, .local_size = 4, .is_supervised = true};
  CHECK(rank_environment(in(with(kMpirun, kBoardVariable, "/x"))) == expected);
  // mpirun inside a Slurm allocation
  Table both = kMpirun;
  both.insert(kSrun.begin(), kSrun.end());
  CHECK(rank_environment(in(both))->rank == 5);
}

TEST_CASE("rank_environment: under srun with PMIx", "[launch]") {
  RankEnvironment expected{.rank = 9, .size = 10, .local_rank = 1, .local_size = 2};
  CHECK(rank_environment(in(kSrun)) == expected);
  expected.is_bound = true;
  CHECK(rank_environment(in(with(kSrun, "SLURM_CPU_BIND_TYPE", "mask_cpu:"))) == expected);
  CHECK(rank_environment(in(with(with(kSrun, "SLURM_NODEID", "1"), "SLURM_PROCID", "7")))
            ->local_size == 4);
}

TEST_CASE("rank_environment: ranks that cannot find one another are refused", "[launch]") {
  CHECK_THAT(refusal(without(kSrun, "PMIX_RANK")),
             Contains("10 tasks") && Contains("srun --mpi=pmix"));
  CHECK_THAT(refusal({{"PMI_RANK", "0"}, {"PMI_SIZE", "4"}}),
             Contains("4 processes") && Contains("not Open MPI's"));
  CHECK(refusal({{"PMI_RANK", "0"}, {"PMI_SIZE", "1"}}) == "accepted");
}

TEST_CASE("rank_environment: nonsense in the variables is named", "[launch]") {
  CHECK_THAT(refusal(with(kMpirun, "OMPI_COMM_WORLD_RANK", "8")),
             Contains("OMPI_COMM_WORLD_RANK is '8', where a number from 0 to 7 belongs"));
  CHECK_THAT(refusal(with(kMpirun, "OMPI_COMM_WORLD_SIZE", "")),
             Contains("OMPI_COMM_WORLD_SIZE is ''"));
  CHECK_THAT(refusal(with(kMpirun, "OMPI_COMM_WORLD_SIZE", "8x")), Contains("'8x'"));
  CHECK_THAT(refusal(without(kMpirun, "OMPI_COMM_WORLD_LOCAL_RANK")),
             Contains("OMPI_COMM_WORLD_LOCAL_RANK is not set"));
  for (const std::string list : {"", "4", "4(x2)", "4(x2", "(x3)", "x,y,z", "4(x2),0", "4(x2),99"})
    CHECK_THAT(refusal(with(kSrun, "SLURM_STEP_TASKS_PER_NODE", list)),
               Contains("SLURM_STEP_TASKS_PER_NODE is '" + list + "'"));
}

TEST_CASE("threads_per_rank: what is set, else a share of the cores", "[launch]") {
  RankEnvironment ranks{.rank = 0, .size = 4, .local_rank = 0, .local_size = 4};
  CHECK(threads_per_rank(3, ranks, 16) == 3);
  CHECK(threads_per_rank(0, ranks, 16) == 4);
  CHECK(threads_per_rank(0, ranks, 7) == 1);
  CHECK(threads_per_rank(0, ranks, 2) == 1);
  ranks.is_bound = true;
  CHECK(threads_per_rank(0, ranks, 6) == 6);
  CHECK(threads_per_rank(0, RankEnvironment{}, 12) == 12);
}

TEST_CASE("device_of_rank: one GPU for each local rank", "[launch]") {
  RankEnvironment ranks{.rank = 6, .size = 8, .local_rank = 2, .local_size = 4};
  CHECK(device_of_rank(ranks, 4) == 2);
  CHECK(device_of_rank(ranks, 8) == 2);
  CHECK(device_of_rank(ranks, 1) == 0);  // each rank is shown its own
  CHECK_THROWS_WITH(device_of_rank(ranks, 3), Contains("4 ranks") && Contains("3 GPUs are"));
  CHECK_THROWS_AS(device_of_rank(ranks, 0), ConfigError);
  CHECK(device_of_rank(RankEnvironment{}, 1) == 0);
}

}  // namespace dstrain
