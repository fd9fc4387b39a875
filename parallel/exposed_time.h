// Measures how long computing stands still for communication (core/metrics/exposed_record.h), step
// by step. On a device two marks enclose whatever holds up the stream that computes, a wait for
// another stream or a collective of its own: the first passes when what was queued before has been
// computed, the second when the communication has ended. On a CPU calls have run when they return,
// and the host's time in them counts, on whichever stream.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/backend/op_clock.h"
#include "core/metrics/exposed_record.h"

namespace dstrain {

// Between the steps, and for a rank that is alone, calls are made and nothing is measured. A step
// that measures no more than those before it allocates nothing. Thread-compatible.
class ExposedTime {
 public:
  // The back end outlives it. `measures`: there are other ranks.
  ExposedTime(Backend& backend, bool measures);

  void begin_step();
  void end_step();
  // Of the oldest step that has ended and was not taken; two may be outstanding. Waits for the
  // device, which after TrainEngine::take_result() has passed all marks of that step.
  ExposedRecord take();

  // `call` makes `stream`, which computes, wait for communication, or queues communication on it.
  template <class Call>
  void on_computing(CommKind kind, Stream& stream, const Call& call) {
    if (!open_) return call();
    const int begin = open_->clock->mark(stream);
    call();
    open_->spans.push_back({kind, begin, open_->clock->mark(stream)});
  }
  // `call` queues communication, and what belongs to it, on a stream of its own.
  template <class Call>
  void beside(CommKind kind, Stream& stream, const Call& call) {
    if (!calls_block_) return call();
    on_computing(kind, stream, call);
  }

 private:
  struct Span {
    CommKind kind;
    int begin, end;  // marks
  };
  struct Step {
    std::unique_ptr<OpClock> clock;
    std::vector<Span> spans;
  };

  const bool measures_, calls_block_;
  std::array<Step, 2> steps_;  // take turns
  int64_t begun_ = 0, taken_ = 0;
  Step* open_ = nullptr;
};

}  // namespace dstrain
