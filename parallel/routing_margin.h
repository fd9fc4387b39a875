// How close a choice of experts was: tells a tie that rounding decided from a fault.
#pragma once

#include <cstdint>
#include <span>

#include "core/config/config.h"

namespace dstrain {

// The smallest change of scores that makes a router choose the recorded experts of one token; 0 if
// it does so already, in any order. With groups, the choice may hang on two groups' scores or on
// two experts'; of the groups kept, at most one is taken to be another. scores_E are those of the
// experts, to which bias_E (may be empty) is added for choosing.
double routing_margin(const ModelConfig& model, std::span<const float> scores_E,
                      std::span<const float> bias_E, std::span<const int32_t> recorded_K);

}  // namespace dstrain
