#include "parallel/rank_progress.h"

#include <unistd.h>

#include <ctime>

namespace dstrain {

const char* phase_text(RankPhase phase) {
  switch (phase) {
    case RankPhase::starting:
      return "starting";
    case RankPhase::data:
      return "reading data";
    case RankPhase::forward_backward:
      return "in forward or backward";
    case RankPhase::reducing:
      return "summing gradients";
    case RankPhase::updating:
      return "updating parameters";
    case RankPhase::evaluating:
      return "evaluating";
    case RankPhase::saving:
      return "saving a checkpoint";
    case RankPhase::leaving:
      return "leaving";
  }
  return "at an unknown place";
}

int64_t monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

RankState read_slot(const RankSlot& slot) {
  RankState state;
  state.pid = slot.pid;
  state.rank = slot.rank;
  state.phase = slot.phase;
  state.step = slot.step;
  state.entered_ns = slot.entered_ns;
  state.seconds = 1e-9 * static_cast<double>(monotonic_ns() - state.entered_ns);
  const int32_t end = slot.end;
  state.is_stuck = end == kStuck;
  if (end >= kFailed) state.failure = end - kFailed;
  return state;
}

void mark_failed(RankSlot& slot, int exit_code) {
  slot.entered_ns = monotonic_ns();
  slot.end = kFailed + exit_code;
}

void RankProgress::share(RankSlot& shared, int64_t rank) {
  slot_ = &shared;
  enter(own_.phase, own_.step);
  shared.rank = static_cast<int32_t>(rank);
  shared.pid = static_cast<int32_t>(::getpid());
}

void RankProgress::enter(RankPhase phase, int64_t step) {
  slot_->phase = phase;
  slot_->step = step;
  slot_->entered_ns = monotonic_ns();
}

}  // namespace dstrain
