#include "parallel/reduce_times.h"

#include <iterator>

namespace dstrain {

ReduceTimes::ReduceTimes(Backend& backend) {
  for (Step& step : steps_) step.clock = backend.make_clock();
}

void ReduceTimes::begin_step(int64_t step) {
  if (begun_ > taken_ && number_ == step) return;
  if (begun_ - taken_ == std::ssize(steps_)) take();
  number_ = step;
  ++begun_;
}

ReduceSeconds ReduceTimes::take() {
  ReduceSeconds seconds;
  if (taken_ == begun_) return seconds;
  Step& step = step_at(taken_++);
  for (const Span& span : step.spans)
    seconds.*span.phase += step.clock->seconds_between(span.begin, span.end);
  step.spans.clear();
  step.clock->clear();
  total_ += seconds;
  return seconds;
}

}  // namespace dstrain
