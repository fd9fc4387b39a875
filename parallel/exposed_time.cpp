#include "parallel/exposed_time.h"

#include "core/base/error.h"

namespace dstrain {

ExposedTime::ExposedTime(Backend& backend, bool measures)
    : measures_(measures), calls_block_(backend.is_cpu()) {
  if (!measures) return;
  for (Step& step : steps_) step.clock = backend.make_clock();
}

void ExposedTime::begin_step() {
  if (!measures_) return;
  DSTRAIN_CHECK(!open_, "a step begins before the last one has ended");
  DSTRAIN_CHECK(begun_ - taken_ < std::ssize(steps_), "take the times of an earlier step first");
  open_ = &steps_[static_cast<size_t>(begun_++) % steps_.size()];
}

void ExposedTime::end_step() {
  open_ = nullptr;
}

ExposedRecord ExposedTime::take() {
  ExposedRecord record;
  if (!measures_) return record;
  DSTRAIN_CHECK(taken_ + (open_ ? 1 : 0) < begun_, "no step has times that were not taken");
  Step& step = steps_[static_cast<size_t>(taken_++) % steps_.size()];
  for (const Span& span : step.spans) {
    std::optional<double>& ms = record.ms[static_cast<size_t>(span.kind)];
    ms = ms.value_or(0) + 1e3 * step.clock->seconds_between(span.begin, span.end);
  }
  step.spans.clear();
  step.clock->clear();
  return record;
}

}  // namespace dstrain
