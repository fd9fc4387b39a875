#include "parallel/watchdog.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace dstrain {

Watchdog::Watchdog(const RankProgress& progress, double limit_s, OnStuck on_stuck)
    : progress_(progress),
      limit_s_(limit_s),
      on_stuck_(std::move(on_stuck)),
      thread_([this] { watch(); }) {}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Watchdog::watch() {
  const double interval_s = std::clamp(limit_s_ / 8, 0.01, 1.0);
  double stopped_s = 0;  // time lost since the rank entered the phase
  int64_t entered_ns = 0;
  int64_t slept_at = monotonic_ns();
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, std::chrono::duration<double>(interval_s),
                         [this] { return is_ending_; })) {
    const int64_t now = monotonic_ns();
    const double slept_s = 1e-9 * static_cast<double>(now - slept_at);
    slept_at = now;
    const RankState state = progress_.state();
    if (std::exchange(entered_ns, state.entered_ns) != state.entered_ns) stopped_s = 0;
    // A busy machine wakes this thread late as well; time beyond a few intervals was no waiting.
    if (slept_s > 4 * interval_s) stopped_s += slept_s;
    if (state.seconds - stopped_s < limit_s_) continue;
    lock.unlock();
    on_stuck_(state);
    return;
  }
}

std::string place_text(const RankState& state) {
  return fmt::format("step {}, {} for {:.0f} s", state.step, phase_text(state.phase),
                     state.seconds);
}

}  // namespace dstrain
