// Where a rank is: its step, the part of the step, and since when. The rank's own thread writes,
// the watchdog and (through shared memory) the launcher read.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <optional>

namespace dstrain {

enum class RankPhase : int32_t {
  starting,
  data,
  forward_backward,
  reducing,
  updating,
  evaluating,
  saving,
  leaving,
};

// "summing gradients": completes "the rank was ...".
const char* phase_text(RankPhase phase);

// One rank's place in shared memory. All zero means: no rank has come yet.
struct RankSlot {
  std::atomic<int32_t> pid{0};  // written last: whoever sees it sees the rank as well
  std::atomic<int32_t> rank{0};
  std::atomic<RankPhase> phase{RankPhase::starting};
  std::atomic<int32_t> end{0};  // kStuck: its watchdog ended it; kFailed + exit code: an error
  std::atomic<int64_t> step{0};
  std::atomic<int64_t> entered_ns{0};  // CLOCK_MONOTONIC, the same for all processes of a host
};
static_assert(std::atomic<int64_t>::is_always_lock_free && sizeof(RankSlot) == 32);
constexpr int32_t kStuck = 1, kFailed = 256;

// A slot as it was at one moment.
struct RankState {
  int64_t rank = 0;
  pid_t pid = 0;  // 0: the rank has not come yet
  RankPhase phase = RankPhase::starting;
  int64_t step = 0;
  int64_t entered_ns = 0;  // when it entered the phase, or failed, by monotonic_ns()
  double seconds = 0;      // since then
  bool is_stuck = false;
  std::optional<int> failure;  // the exit code of an error of its own
};

// Nanoseconds of CLOCK_MONOTONIC.
int64_t monotonic_ns();
RankState read_slot(const RankSlot& slot);
// That the rank ends with this code for a reason of its own, not because a peer has ended.
void mark_failed(RankSlot& slot, int exit_code);

// The writing end. One thread writes; any may read.
class RankProgress {
 public:
  RankProgress() { enter(RankPhase::starting, 0); }
  // Goes on in `shared`, which outlives this, and marks it as taken by this process. To be called
  // before any watchdog reads.
  void share(RankSlot& shared, int64_t rank);

  // The step is the one under way. Costs two stores and a read of the clock.
  void enter(RankPhase phase, int64_t step);
  void mark_stuck() { slot_->end = kStuck; }
  RankState state() const { return read_slot(*slot_); }

 private:
  RankSlot own_;
  RankSlot* slot_ = &own_;
};

}  // namespace dstrain
