#include "apps/launch_plan.h"

#include <algorithm>

#include "core/base/error.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

using Catch::Contains;
using Words = std::vector<std::string>;

Config job(int64_t ranks, Words hosts = {}) {
  Config config;
  config.launch.ranks.value = ranks;
  config.launch.hosts = std::move(hosts);
  return config;
}

LaunchPlan plan(std::vector<HostRanks> hosts) {
  LaunchPlan plan;
  plan.hosts = std::move(hosts);
  plan.mpirun = {"mpirun", "/usr/bin/mpirun", 4};
  plan.machine.cores = 8;
  plan.program = "/opt/deepseek-train";
  plan.session_folder = "/dev/shm/s";
  return plan;
}

bool holds(const Words& words, const Words& run) {
  return std::search(words.begin(), words.end(), run.begin(), run.end()) != words.end();
}

}  // namespace

TEST_CASE("launch_mode: alone, as a launcher, or as a rank", "[launch]") {
  const RankEnvironment rank{.rank = 1, .size = 4, .local_rank = 1, .local_size = 4};
  struct Case {
    int64_t ranks;
    Words hosts;
    bool is_rank;
    int64_t gpus;
    LaunchMode mode;
  };
  const auto single = LaunchMode::single, launcher = LaunchMode::launcher,
             as_rank = LaunchMode::rank;
  for (const Case& c : std::vector<Case>{{0, {}, false, 0, single},
                                         {0, {}, false, 1, single},
                                         {0, {}, false, 8, launcher},
                                         {1, {}, false, 8, single},
                                         {4, {}, false, 0, launcher},
                                         {1, {"node1"}, false, 0, launcher},
                                         {0, {}, true, 8, as_rank},
                                         {4, {"node1"}, true, 0, as_rank},
                                         {1, {}, true, 0, as_rank}}) {
    CAPTURE(c.ranks, c.hosts, c.is_rank, c.gpus);
    const auto hosts = ranks_to_start(job(c.ranks, c.hosts), c.gpus);
    CHECK(launch_mode(c.is_rank ? std::optional(rank) : std::nullopt, hosts) == c.mode);
  }
}

TEST_CASE("ranks_to_start: what the job file says, else the GPUs, else the layout", "[launch]") {
  CHECK(ranks_to_start(job(4), 8) == std::vector<HostRanks>{{"", 4}});
  CHECK(ranks_to_start(job(0), 8) == std::vector<HostRanks>{{"", 8}});
  CHECK(ranks_to_start(job(0), 0) == std::vector<HostRanks>{{"", 1}});
  CHECK(ranks_to_start(job(4, {"a", "b"}), 0) == std::vector<HostRanks>{{"a", 4}, {"b", 4}});
  CHECK(ranks_to_start(job(4, {"a:2", "b"}), 0) == std::vector<HostRanks>{{"a", 2}, {"b", 4}});
  CHECK(ranks_to_start(job(0, {"a:2", "b:6"}), 1) == std::vector<HostRanks>{{"a", 2}, {"b", 6}});
  CHECK(ranks_to_start(job(0, {"a", "b"}), 4) == std::vector<HostRanks>{{"a", 4}, {"b", 4}});
  CHECK(total_ranks({{"a", 2}, {"b", 6}}) == 8);

  Config cpu = job(0);
  cpu.run.device = Device::cpu;
  CHECK(ranks_to_start(cpu, 8) == std::vector<HostRanks>{{"", 1}});
  cpu.parallel.tensor = 2;
  cpu.parallel.pipeline = 2;
  CHECK(ranks_to_start(cpu, 8) == std::vector<HostRanks>{{"", 4}});
  cpu.parallel.data.value = 3;
  CHECK(ranks_to_start(cpu, 8) == std::vector<HostRanks>{{"", 12}});
  cpu.launch.hosts = {"a", "b", "c", "d"};
  CHECK(ranks_to_start(cpu, 8)[3] == HostRanks{"d", 3});
  cpu.launch.hosts = {"a", "b", "c", "d", "e"};
  CHECK_THROWS_WITH(ranks_to_start(cpu, 8), Contains("12 ranks") && Contains("5 hosts"));
}

TEST_CASE("mpirun_command: ranks on this machine", "[launch]") {
  LaunchPlan local = plan({{"", 4}});
  const MpirunCommand command = mpirun_command(local, {"--config", "job.yaml"});
  CHECK(command.path == "/usr/bin/mpirun");
  CHECK(command.words == Words{"mpirun",
                               "-np",
                               "4",
                               "--bind-to",
                               "none",
                               "--oversubscribe",
                               "--mca",
                               "orte_base_help_aggregate",
                               "0",
                               "--mca",
                               "orte_tmpdir_base",
                               "/dev/shm/s",
                               "--mca",
                               "btl_vader_backing_directory",
                               "/dev/shm/s",
                               "-x",
                               "DSTRAIN_RANK_BOARD=/dev/shm/s/ranks",
                               "/opt/deepseek-train",
                               "--config",
                               "job.yaml"});
  CHECK(command.variables.empty());
  CHECK(command.notes.empty());

  local.columns = 132;
  local.machine.can_read_processes = false;
  local.machine.cores = 2;
  const MpirunCommand more = mpirun_command(local, {});
  CHECK(holds(more.words, {"-x", "DSTRAIN_COLUMNS=132"}));
  CHECK(holds(more.words, {"--mca", "btl_vader_single_copy_mechanism", "none"}));
  REQUIRE(more.notes.size() == 1);
  CHECK_THAT(more.notes[0], Contains("4 ranks share 2 cores"));

  // What another version would not know is left out.
  local.mpirun.major = 5;
  const Words other = mpirun_command(local, {}).words;
  CHECK(holds(other, {"--map-by", ":OVERSUBSCRIBE"}));
  CHECK_FALSE(holds(other, {"--mca"}));
}

TEST_CASE("mpirun_command: ranks on other hosts", "[launch]") {
  LaunchPlan cluster = plan({{"node1", 8}, {"node2", 4}});
  const Words words = mpirun_command(cluster, {}).words;
  CHECK(holds(words, {"mpirun", "-np", "12", "--host", "node1:8,node2:4", "--bind-to", "none"}));
  // Folders of this machine and its slots say nothing about the others.
  CHECK_FALSE(holds(words, {"--oversubscribe"}));
  CHECK_FALSE(holds(words, {"orte_tmpdir_base"}));
  CHECK_FALSE(holds(words, {"--prefix"}));

  cluster.mpirun = {"/opt/openmpi/bin/mpirun", "/opt/openmpi/bin/mpirun", 4};
  CHECK(holds(mpirun_command(cluster, {}).words, {"--prefix", "/opt/openmpi"}));
}

TEST_CASE("mpirun_command: hosts keep their domains", "[launch]") {
  LaunchPlan cluster = plan({{"node1.cluster.example", 8}, {"node2.cluster.example", 4}});
  const Words whole = {"--host", "node1.cluster.example:8,node2.cluster.example:4", "--mca",
                       "orte_keep_fqdn_hostnames", "1"};
  CHECK(holds(mpirun_command(cluster, {}).words, whole));
  // This machine under the name that mpirun knows it by: it is not to reach itself through ssh.
  cluster.machine.name = "node2";
  CHECK(holds(mpirun_command(cluster, {}).words, {"--host", "node1.cluster.example:8,node2:4"}));

  cluster.hosts = {{"10.0.0.1", 8}, {"10.0.0.2", 4}};
  const Words addresses = mpirun_command(cluster, {}).words;
  CHECK(holds(addresses, {"--host", "10.0.0.1:8,10.0.0.2:4"}));
  CHECK_FALSE(holds(addresses, {"orte_keep_fqdn_hostnames"}));
}

TEST_CASE("mpirun_command: root needs a container or the user's word", "[launch]") {
  LaunchPlan local = plan({{"", 2}});
  local.machine.is_root = true;
  CHECK_THROWS_AS(mpirun_command(local, {}), PermissionError);
  CHECK_THROWS_WITH(mpirun_command(local, {}), Contains("OMPI_ALLOW_RUN_AS_ROOT=1") &&
                                                   Contains("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"));
  local.machine.allows_root = true;
  CHECK(mpirun_command(local, {}).variables.empty());
  local.machine.allows_root = false;
  local.machine.is_container = true;
  const MpirunCommand command = mpirun_command(local, {});
  CHECK(command.variables ==
        std::vector<std::pair<std::string, std::string>>{{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                                                         {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}});
  REQUIRE(command.notes.size() == 1);
  CHECK_THAT(command.notes[0], Contains("root in a container"));
}

TEST_CASE("shell_text: a shell reads the same words", "[launch]") {
  CHECK(shell_text({"mpirun", "-np", "4"}) == "mpirun -np 4");
  CHECK(shell_text({"a b", "", "it's", "$x", "a;b"}) == "'a b' '' 'it'\\''s' '$x' 'a;b'");
}

}  // namespace dstrain
