// AdamW over flat ranges of parameters: clipping by the global norm, finite check and update, all queued
// on the stream without the host looking.
#pragma once

#include "core/backend/ops.h"
#include "core/config/config.h"
#include "core/dist/param_store.h"

namespace dstrain {

class AdamW {
 public:
  explicit AdamW(const OptimizerConfig& config) : config_(config) {}

  // From the sum of all squared gradients to norm, clipping coefficient, finite flag, update number and bias
  // corrections, in scalars (device memory).
  void clip(Ops& ops, Stream& stream, const Tensor& sum_1, StepScalars* scalars) const;
  // A step whose gradient norm is not finite changes nothing.
  void update(Ops& ops, Stream& stream, const OptimizerRange& range, const StepScalars* scalars) const;

 private:
  OptimizerConfig config_;
};

}  // namespace dstrain
