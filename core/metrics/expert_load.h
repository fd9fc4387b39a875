// From a step's expert counts to the figures that people watch.
#pragma once

#include <cstdint>
#include <span>

#include "core/metrics/step_record.h"

namespace dstrain {

// counts: [layers, experts], tokens per expert over the global batch. balance_loss is passed on.
ExpertLoad expert_load(std::span<const int64_t> counts, int64_t layers, double balance_loss);

}  // namespace dstrain
