#include "core/optim/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace dstrain {

double learning_rate(const ScheduleConfig& schedule, double peak, int64_t step, int64_t steps) {
  const int64_t warmup = schedule.warmup.resolve(steps);
  if (step <= warmup) return peak * static_cast<double>(step) / static_cast<double>(warmup);
  int64_t begin = warmup;
  if (schedule.name == ScheduleName::constant) return peak;
  if (schedule.name == ScheduleName::wsd)
    begin = std::max(warmup, steps - schedule.decay.resolve(steps));
  if (step <= begin) return peak;
  // 0 just before the decay, 1 at the last step.
  const double progress =
      std::min(1.0, static_cast<double>(step - begin) / static_cast<double>(steps - begin));
  const double fall = schedule.name == ScheduleName::cosine
                          ? 0.5 * (1 + std::cos(std::numbers::pi * progress))
                          : 1 - progress;
  return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * fall);
}

}  // namespace dstrain
