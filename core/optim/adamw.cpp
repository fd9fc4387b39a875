#include "core/optim/adamw.h"

namespace dstrain {

void AdamW::clip(Ops& ops, Stream& stream, const Tensor& sum_1, StepScalars* scalars) const {
  ops.clip_scale(stream, sum_1, config_.grad_clip, config_.betas.first, config_.betas.second, scalars);
}

void AdamW::update(Ops& ops, Stream& stream, const OptimizerRange& range, const StepScalars* scalars) const {
  const AdamWParams params = {config_.betas.first, config_.betas.second, config_.eps,
                              range.weight_decay ? config_.weight_decay : 0.0};
  ops.adamw(stream, params, scalars, range.grad, range.value, range.value_low, range.exp_avg, range.exp_avg_sq);
}

}  // namespace dstrain
