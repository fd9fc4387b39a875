// How long the sums of gradients of a step take, compression included. On a device it is the time
// between two marks of the stream that communicates: kernels and transfers, and waiting for ranks
// that come later, but not for gradients, whether or not computing goes on beside it. On a CPU it
// is the host's time in the calls.
//
// Marks are read when the device has passed them, so that nobody waits: times come step by step,
// after the results of the step.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/backend/op_clock.h"

namespace dstrain {

struct ReduceSeconds {
  double reduce = 0, gather = 0;  // reduce_scatter and all_gather of GradReducer
  ReduceSeconds& operator+=(const ReduceSeconds& other) {
    reduce += other.reduce;
    gather += other.gather;
    return *this;
  }
};

// A step that makes no more calls than those before it allocates nothing. Thread-compatible.
class ReduceTimes {
 public:
  // The back end outlives it.
  explicit ReduceTimes(Backend& backend);

  // Begins a step, unless it has this number already: every reducer tells. Where two steps are
  // outstanding, the older one is taken, which may wait for the device.
  void begin_step(int64_t step);
  // `call` queues what is summed, or gathered, on the stream. Before the first step, and after a
  // step was taken, nothing is measured.
  template <class Call>
  void measure(double ReduceSeconds::*phase, Stream& stream, const Call& call) {
    if (begun_ == taken_) return call();
    Step& step = step_at(begun_ - 1);
    const int begin = step.clock->mark(stream);
    call();
    step.spans.push_back({phase, begin, step.clock->mark(stream)});
  }

  // Of the oldest step that was not taken; nothing where there is none. Waits for the device, which
  // after TrainEngine::take_result() has passed all marks of that step.
  ReduceSeconds take();
  const ReduceSeconds& total() const { return total_; }  // of all steps taken

 private:
  struct Span {
    double ReduceSeconds::*phase;
    int begin, end;  // marks
  };
  struct Step {
    std::unique_ptr<OpClock> clock;
    std::vector<Span> spans;
  };
  Step& step_at(int64_t count) { return steps_[static_cast<size_t>(count) % steps_.size()]; }

  std::array<Step, 2> steps_;  // take turns
  int64_t begun_ = 0, taken_ = 0;
  int64_t number_ = 0;  // of the step begun last
  ReduceSeconds total_;
};

}  // namespace dstrain
