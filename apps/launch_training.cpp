#include "apps/launch_training.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "apps/assemble.h"
#include "apps/launch_machine.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/progress.h"
#include "core/checkpoint/run_lock.h"

namespace dstrain {
namespace {

// What the ranks are needed for, to begin a sentence with.
std::string reason_for(const Config& config, int64_t ranks) {
  if (!config.launch.hosts.empty()) return "launch.hosts";
  if (!config.launch.ranks.is_auto()) return fmt::format("launch.ranks: {}", ranks);
  return fmt::format("a job of {} ranks", ranks);
}

// Ranks that found the folder in use would be started again until it is free, and with --overwrite
// delete what the other run saved. Those of a launcher that was killed take a moment to leave.
void require_free(const std::string& run_folder) {
  constexpr std::chrono::milliseconds kLeavingTime{5000}, kLook{100};
  if (!is_folder(run_folder)) return;
  check_run_folder(run_folder);
  for (auto left = kLeavingTime;; left -= kLook) {
    try {
      const RunLock free(run_folder);
      return;
    } catch (const RuntimeFailure&) {
      if (left.count() <= 0) throw;
    }
    std::this_thread::sleep_for(kLook);
  }
}

}  // namespace

int launch_training(const Config& config, const std::vector<HostRanks>& hosts,
                    const std::vector<std::string>& words, const LauncherConsole& console,
                    const Variables& variables) {
  const RunPaths paths(config);
  require_free(paths.folder);
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
