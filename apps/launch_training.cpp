#include "apps/launch_training.h"

#include <fmt/format.h>

#include <algorithm>

#include "apps/assemble.h"
#include "apps/launch_machine.h"
#include "apps/run_folder.h"
#include "core/base/progress.h"

namespace dstrain {
namespace {

// What the ranks are needed for, to begin a sentence with.
std::string reason_for(const Config& config, int64_t ranks) {
  if (!config.launch.hosts.empty()) return "launch.hosts";
  if (!config.launch.ranks.is_auto()) return fmt::format("launch.ranks: {}", ranks);
  return fmt::format("a job of {} ranks", ranks);
}

}  // namespace

int launch_training(const Config& config, const std::vector<HostRanks>& hosts,
                    const std::vector<std::string>& words, const LauncherConsole& console,
                    const Variables& variables) {
  const RunPaths paths(config);
  const RunFolder folder(paths.folder, RunRole::launcher);  // as long as the job lives
  LaunchJob job;
  job.plan.hosts = hosts;
  job.plan.mpirun = find_mpirun(variables, reason_for(config, total_ranks(hosts)));
  job.plan.machine = look_at_machine(variables);
  job.plan.program = program_path();
  if (console.live) job.plan.columns = terminal_width(2);
  job.words = words;
  if (std::find(words.begin(), words.end(), "--color") == words.end())
    job.words.insert(job.words.end(), {"--color", console.color ? "always" : "never"});
  job.checkpoints_folder = paths.checkpoints;
  job.max_restarts = config.launch.max_restarts;
  job.temporary_folders.back() = temporary_folder(variables);
  job.times.grace_s = static_cast<double>(config.launch.grace);
  return run_launcher(job);
}

}  // namespace dstrain
