#include "core/optim/adamw.h"

#include <cmath>
#include <utility>

namespace dstrain {

AdamW::AdamW(const OptimizerConfig& config, const ParameterSet& parameters, Tensor values, Tensor grads,
             Tensor exp_avg, Tensor exp_avg_sq, StepScalars* scalars, Tensor norm_1)
    : config_(config),
      parameters_(parameters),
      values_(values),
      grads_(grads),
      exp_avg_(exp_avg),
      exp_avg_sq_(exp_avg_sq),
      scalars_(scalars),
      norm_1_(norm_1) {}

void AdamW::step(Ops& ops, Stream& stream) const {
  ops.fill(stream, norm_1_, 0.0);
  for (const ParameterGroup& group : parameters_.groups())
    ops.add_sum_squares(stream, grads_.rows(group.begin, group.end), norm_1_);
  ops.clip_scale(stream, norm_1_, config_.grad_clip, scalars_);
  for (const ParameterGroup& group : parameters_.groups()) {
    const AdamWParams params = {config_.betas.first, config_.betas.second, config_.eps,
                                group.weight_decay ? config_.weight_decay : 0.0};
    ops.adamw(stream, params, scalars_, grads_.rows(group.begin, group.end),
              values_.rows(group.begin, group.end), exp_avg_.rows(group.begin, group.end),
              exp_avg_sq_.rows(group.begin, group.end));
  }
}

void AdamW::set_bias_corrections(StepScalars& scalars, int64_t t) const {
  scalars.bias_correction1 = 1 - std::pow(config_.betas.first, static_cast<double>(t));
  scalars.bias_correction2 = 1 - std::pow(config_.betas.second, static_cast<double>(t));
}

}  // namespace dstrain
