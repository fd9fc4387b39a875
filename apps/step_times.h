// How long the steps of a run take on its device, whenever the host reads their results. The time
// of a step begins when the device has done what was queued before the host began with the step,
// or then if there was nothing, and ends with its last work: steps that follow each other add up
// to the time that passed, waits for data included. Saves and evaluations lie between steps.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "core/backend/op_clock.h"

namespace dstrain {

struct StepTime {
  double seconds = 0;
  double update_seconds = 0;  // of them: behind the last micro-batch
};

// Two steps may be outstanding; allocates nothing after them. Thread-compatible.
class StepTimes {
 public:
  explicit StepTimes(Backend& backend);

  // Around the work of a step, all of it on this stream or waited for there. Asynchronous.
  void begin(Stream& stream);
  void begin_update(Stream& stream);
  void end(Stream& stream);
  // Of the oldest step that was not taken. Waits for the device, which after
  // TrainEngine::take_result() has come to the end of that step.
  StepTime take();

 private:
  OpClock& clock_of(int64_t step) { return *clocks_[static_cast<size_t>(step) % clocks_.size()]; }

  std::array<std::unique_ptr<OpClock>, 2> clocks_;  // take turns
  int64_t begun_ = 0, taken_ = 0;
};

}  // namespace dstrain
