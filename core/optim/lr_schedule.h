// Learning rate over steps: linear warm-up, then constant, linear, cosine (Loshchilov & Hutter,
// arXiv:1608.03983) or warm-up-stable-decay (Hu et al., arXiv:2404.06395, linear decay).
#pragma once

#include <cstdint>

#include "core/config/config.h"

namespace dstrain {

// For step 1..steps (the first update is step 1). Warm-up reaches the peak at its last step, or
// not at all if it is longer than the run; the last step of the run uses min_lr_ratio * peak.
double learning_rate(const ScheduleConfig& schedule, double peak, int64_t step, int64_t steps);

}  // namespace dstrain
