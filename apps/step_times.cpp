#include "apps/step_times.h"

#include "core/base/error.h"

namespace dstrain {
namespace {

enum Mark { kBegin, kUpdate, kEnd };

void mark(OpClock& clock, Stream& stream, Mark expected) {
  const int number = clock.mark(stream);
  DSTRAIN_CHECK(number == expected, "the parts of a step are not timed in their order");
}

}  // namespace

StepTimes::StepTimes(Backend& backend) {
  for (auto& clock : clocks_) clock = backend.make_clock();
}

void StepTimes::begin(Stream& stream) {
  DSTRAIN_CHECK(begun_ - taken_ < std::ssize(clocks_), "take the time of an earlier step first");
  mark(clock_of(begun_++), stream, kBegin);
}

void StepTimes::begin_update(Stream& stream) {
  mark(clock_of(begun_ - 1), stream, kUpdate);
}

void StepTimes::end(Stream& stream) {
  mark(clock_of(begun_ - 1), stream, kEnd);
}

StepTime StepTimes::take() {
  DSTRAIN_CHECK(taken_ < begun_, "no step has a time that was not taken");
  OpClock& clock = clock_of(taken_++);
  const StepTime time = {clock.seconds_between(kBegin, kEnd), clock.seconds_between(kUpdate, kEnd)};
  clock.clear();
  return time;
}

}  // namespace dstrain
