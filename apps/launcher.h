// Starts the ranks of a job through mpirun, stays as their supervisor, and starts them again from
// the newest checkpoint when they fail.
//
//   SIGUSR1             the ranks save a checkpoint and go on
//   SIGTERM, SIGHUP     the ranks save a checkpoint and leave (they get SIGUSR2); after a grace
//   SIGUSR2             period they are ended, saved or not
//   SIGINT              the same; a second one ends the ranks at once
//
// The ranks' output is passed on as it comes. When this process is killed, mpirun ends the ranks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "apps/launch_plan.h"

namespace dstrain {

struct LaunchTimes {
  double grace_s = 25;  // for saving and leaving; Slurm and Kubernetes kill after 30
  double end_s = 5;     // from SIGTERM to SIGKILL for mpirun, which needs two
  // Signals wait until every rank has come, since a rank that is only starting would die of them. A
  // rank on another host is not seen; this long after its start it counts as come.
  double ready_s = 10;
  // For mpirun to end after a rank has found the job to hang: it waits for hosts it cannot reach.
  double hung_s = 15;
  double pause_s = 1;  // before the ranks are started again
};

struct LaunchJob {
  LaunchPlan plan;                 // session_folder is filled in here
  std::vector<std::string> words;  // of this program's command line; the ranks get them
  std::string checkpoints_folder;  // empty: the ranks do not train
  int64_t max_restarts = 0;
  // For files that live as long as the job: shared memory, if there is room, is faster.
  std::vector<std::string> temporary_folders = {"/dev/shm", "/tmp"};
  LaunchTimes times = {};
};

// Runs the job to its end. Returns the exit code: that of the first rank that failed, 1 if a signal
// ended it, 75 after a save on request. To be called by the main thread, while no other thread
// runs. PermissionError, RuntimeFailure or StorageError if nothing can be started.
int run_launcher(const LaunchJob& job);

}  // namespace dstrain
