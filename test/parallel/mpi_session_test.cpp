// Who started this process, from the environment alone.
#include "parallel/mpi_session.h"

#include <map>
#include <string>

#include "test/support/catch.h"

namespace dstrain::test {
namespace {

MpiLaunch launch_in(const std::map<std::string, std::string>& environment) {
  return mpi_launch([&](const char* name) {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

TEST_CASE("mpi launch: known by the environment of each launcher", "[parallel]") {
  const MpiLaunch mpirun = launch_in({{"OMPI_COMM_WORLD_SIZE", "4"}, {"PMIX_RANK", "1"}});
  CHECK(mpirun.launcher == "mpirun");
  CHECK(mpirun.ranks == 4);
  const MpiLaunch pmix = launch_in({{"PMIX_RANK", "0"},
                                    {"SLURM_STEP_ID", "0"},
                                    {"SLURM_STEP_NUM_TASKS", "8"},
                                    {"SLURM_PROCID", "0"}});
  CHECK(pmix.launcher == "PMIx");
  CHECK(pmix.ranks == 8);
  const MpiLaunch pmi = launch_in({{"PMI_RANK", "0"}, {"PMI_SIZE", "2"}});
  CHECK(pmi.launcher == "PMI");
  CHECK(pmi.ranks == 2);
  const MpiLaunch srun =
      launch_in({{"SLURM_PROCID", "3"}, {"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NUM_TASKS", "4"}});
  CHECK(srun.launcher == "srun");
  CHECK(srun.ranks == 4);
}

TEST_CASE("mpi launch: a shell, a batch script or one task of srun is no launch", "[parallel]") {
  CHECK_FALSE(launch_in({}));
  CHECK_FALSE(launch_in({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}}));
  CHECK_FALSE(
      launch_in({{"SLURM_PROCID", "0"}, {"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NUM_TASKS", "1"}}));
  CHECK_FALSE(
      launch_in({{"SLURM_PROCID", "0"}, {"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NUM_TASKS", "many"}}));
}

}  // namespace
}  // namespace dstrain::test
