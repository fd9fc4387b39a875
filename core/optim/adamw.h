// AdamW over the flat parameter range: global norm, clipping, finite check and update, all queued on the
// stream without the host looking. Moments are flat arrays with the offsets of the parameters.
#pragma once

#include "core/backend/ops.h"
#include "core/config/config.h"
#include "core/dist/parameter.h"

namespace dstrain {

class AdamW {
 public:
  // exp_avg and exp_avg_sq have parameters.trainable_elements() elements; values and grads are the flat
  // arrays that the parameters are bound to. Scalars and norm_1 (f64) are device memory.
  AdamW(const OptimizerConfig& config, const ParameterSet& parameters, Tensor values, Tensor grads,
        Tensor exp_avg, Tensor exp_avg_sq, StepScalars* scalars, Tensor norm_1);

  // Reads lr and bias corrections from the scalars; writes norm, scale and finite into them. A step
  // whose gradient norm is not finite changes nothing.
  void step(Ops& ops, Stream& stream) const;

  // Bias corrections of update t = 1, 2, ...
  void set_bias_corrections(StepScalars& scalars, int64_t t) const;

  const Tensor& exp_avg() const { return exp_avg_; }
  const Tensor& exp_avg_sq() const { return exp_avg_sq_; }

 private:
  OptimizerConfig config_;
  const ParameterSet& parameters_;
  Tensor values_, grads_, exp_avg_, exp_avg_sq_;
  StepScalars* scalars_;
  Tensor norm_1_;
};

}  // namespace dstrain
