// Notices a rank that makes no progress: one that waits for a peer that is gone or stopped, or one
// that is itself stuck. MPI notices neither.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "parallel/rank_progress.h"

namespace dstrain {

// A thread that calls on_stuck once, with where the rank is, when `progress` has not entered
// anything for `limit_s` seconds. The time during which this whole process was stopped, as by
// Ctrl-Z or a suspended machine, does not count. on_stuck runs on the watchdog's thread and usually
// ends the process: the rank's own thread is stuck.
class Watchdog {
 public:
  using OnStuck = std::function<void(const RankState&)>;

  // `progress` outlives the watchdog.
  Watchdog(const RankProgress& progress, double limit_s, OnStuck on_stuck);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  void watch();

  const RankProgress& progress_;
  const double limit_s_;
  const OnStuck on_stuck_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool is_ending_ = false;
  std::thread thread_;  // last: it uses the members above
};

// "step 812, summing gradients for 61 s".
std::string place_text(const RankState& state);

}  // namespace dstrain
