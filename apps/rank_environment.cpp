#include "apps/rank_environment.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <string_view>

#include "apps/launch_variables.h"
#include "core/base/error.h"

namespace dstrain {
namespace {

std::optional<int64_t> number_in(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// UsageError unless the variable is a number from `low` to `high`.
int64_t required_number(const Variables& variables, const char* name, int64_t low, int64_t high) {
  const char* text = variables(name);
  const std::optional<int64_t> value = number_in(text ? text : "");
  if (!value || *value < low || *value > high)
    throw UsageError(fmt::format(
        "the environment variable {} is {}, where a number from {} to {} belongs; start the ranks "
        "with mpirun, with srun --mpi=pmix, or with launch.ranks in the job file",
        name, text ? fmt::format("'{}'", text) : "not set", low, high));
  return *value;
}

constexpr int64_t kMostRanks = int64_t{1} << 24;

// Slurm's count of tasks on each node, such as "4(x2),3": the count of this node.
std::optional<int64_t> tasks_on_node(std::string_view list, int64_t node) {
  while (!list.empty()) {
    const size_t comma = std::min(list.find(','), list.size());
    std::string_view entry = list.substr(0, comma);
    list.remove_prefix(std::min(comma + 1, list.size()));
    int64_t repeat = 1;
    if (const size_t open = entry.find("(x"); open != entry.npos && entry.back() == ')') {
      repeat = number_in(entry.substr(open + 2, entry.size() - open - 3)).value_or(0);
      entry = entry.substr(0, open);
    }
    if (node < repeat) return number_in(entry);
    node -= repeat;
  }
  return std::nullopt;
}

RankEnvironment under_mpirun(const Variables& variables) {
  RankEnvironment ranks;
  ranks.size = required_number(variables, "OMPI_COMM_WORLD_SIZE", 1, kMostRanks);
  ranks.rank = required_number(variables, "OMPI_COMM_WORLD_RANK", 0, ranks.size - 1);
  ranks.local_size = required_number(variables, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, ranks.size);
  ranks.local_rank =
      required_number(variables, "OMPI_COMM_WORLD_LOCAL_RANK", 0, ranks.local_size - 1);
  const char* bound = variables("OMPI_MCA_orte_bound_at_launch");
  ranks.is_bound = bound != nullptr && std::string_view(bound) == "1";
  return ranks;
}

RankEnvironment under_srun(const Variables& variables) {
  RankEnvironment ranks;
  ranks.size = required_number(variables, "SLURM_STEP_NUM_TASKS", 1, kMostRanks);
  ranks.rank = required_number(variables, "SLURM_PROCID", 0, ranks.size - 1);
  const int64_t node = required_number(variables, "SLURM_NODEID", 0, kMostRanks);
  const char* counts = variables("SLURM_STEP_TASKS_PER_NODE");
  const std::optional<int64_t> here = tasks_on_node(counts ? counts : "", node);
  if (!here || *here < 1 || *here > ranks.size)
    throw UsageError(fmt::format(
        "SLURM_STEP_TASKS_PER_NODE is '{}', which does not say how many tasks node {} has; start "
        "the ranks with srun --mpi=pmix",
        counts ? counts : "", node));
  ranks.local_size = *here;
  ranks.local_rank = required_number(variables, "SLURM_LOCALID", 0, ranks.local_size - 1);
  const char* binding = variables("SLURM_CPU_BIND_TYPE");
  ranks.is_bound = binding != nullptr && (std::string_view(binding).starts_with("mask_cpu") ||
                                          std::string_view(binding).starts_with("map_cpu"));
  return ranks;
}

bool is_above_one(const char* text) {
  return text != nullptr && number_in(text).value_or(1) > 1;
}

// Whether this is the task of srun --pty that has the terminal: as a rule a shell, as salloc opens
// one on a node, and what a person starts in it is one process. Shells of the other tasks end at
// once. An srun in that shell passes the port on, hence the second variable.
bool is_in_terminal_of_srun(const Variables& variables) {
  const char* task = variables("SLURM_PROCID");
  return variables("SLURM_PTY_PORT") != nullptr && task != nullptr && number_in(task) == 0;
}

bool is_only_task_of_srun(const Variables& variables) {
  const char* tasks = variables("SLURM_STEP_NUM_TASKS");
  return tasks != nullptr ? number_in(tasks) == 1 : is_in_terminal_of_srun(variables);
}

}  // namespace

std::optional<RankEnvironment> rank_environment(const Variables& variables) {
  RankEnvironment ranks;
  if (variables("OMPI_COMM_WORLD_RANK") != nullptr) {
    ranks = under_mpirun(variables);
  } else if (is_only_task_of_srun(variables)) {
    return std::nullopt;  // so that it may start ranks of its own
  } else if (variables("SLURM_STEP_ID") != nullptr && variables("PMIX_RANK") != nullptr) {
    ranks = under_srun(variables);
  } else if (is_above_one(variables("SLURM_STEP_NUM_TASKS")) &&
             variables("SLURM_STEP_ID") != nullptr) {
    throw UsageError(fmt::format(
        "srun started {} tasks that cannot find one another; start them with srun --mpi=pmix, or "
        "start one task and set launch.ranks in the job file",
        variables("SLURM_STEP_NUM_TASKS")));
  } else if (is_above_one(variables("PMI_SIZE"))) {
    throw UsageError(fmt::format(
        "the mpiexec that started {} processes is not Open MPI's, which this program is built "
        "with; "
        "use Open MPI's mpirun, or start one process and set launch.ranks in the job file",
        variables("PMI_SIZE")));
  } else {
    return std::nullopt;
  }
  ranks.is_supervised = variables(kBoardVariable) != nullptr;
  return ranks;
}

void require_one_process(const std::string& command, const Variables& variables) {
  const char* starter = nullptr;
  const char* count = nullptr;
  if (is_above_one(count = variables("OMPI_COMM_WORLD_SIZE")))
    starter = "mpirun";
  else if (variables("SLURM_STEP_ID") && !is_in_terminal_of_srun(variables) &&
           is_above_one(count = variables("SLURM_STEP_NUM_TASKS")))
    starter = "srun";
  else if (is_above_one(count = variables("PMI_SIZE")))
    starter = "mpiexec";
  if (starter == nullptr) return;
  throw UsageError(fmt::format(
      "'{0}' is the work of one process, and {1} started {2} of them, which would all do it and "
      "write to the same place; start it once, without {1}: deepseek-train {0} ...",
      command, starter, count));
}

int64_t threads_per_rank(int64_t configured, const RankEnvironment& ranks, int64_t cores) {
  if (configured > 0) return configured;
  return std::max<int64_t>(1, ranks.is_bound ? cores : cores / ranks.local_size);
}

int64_t device_of_rank(const RankEnvironment& ranks, int64_t visible_gpus) {
  if (visible_gpus == 1 && ranks.local_size > 1) return 0;
  if (visible_gpus < ranks.local_size)
    throw ConfigError(fmt::format(
        "{} ranks run on this host, but {} GPU{} visible; a rank needs a GPU of its own: lower "
        "launch.ranks or the layout under parallel, or set run.device: cpu",
        ranks.local_size, visible_gpus, visible_gpus == 1 ? " is" : "s are"));
  return ranks.local_rank;
}

std::string machine_name() {
  char name[256] = "";
  ::gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace dstrain
