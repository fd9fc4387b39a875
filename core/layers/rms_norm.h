// Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467), one row per token:
//   y[t,d] = x[t,d] * rstd[t] * weight[d],   rstd[t] = 1 / sqrt(mean_d(x[t,d]^2) + eps)
// fused with the residual addition before it: x is the sum of the stream and the last sublayer.
#pragma once

#include "core/layers/declare.h"
#include "core/layers/step_context.h"

namespace dstrain {

class RmsNorm {
 public:
  RmsNorm(const Declare& declare, int64_t size, double eps)
      : weight_(declare.gain("weight", size)), eps_(eps) {}

  // x, y and their gradients may be strided; rstd_T is f32 (f64).
  void forward(StepContext& ctx, const Tensor& x_TD, const Tensor& y_TD, const Tensor& rstd_T) const {
    ctx.ops.add_rms_norm(ctx.stream, x_TD, {}, weight_.value, eps_, {}, y_TD, rstd_T);
  }
  // sum = x + delta, y = norm(sum).
  void forward_add(StepContext& ctx, const Tensor& x_TD, const Tensor& delta_TD, const Tensor& sum_TD,
                   const Tensor& y_TD, const Tensor& rstd_T) const {
    ctx.ops.add_rms_norm(ctx.stream, x_TD, delta_TD, weight_.value, eps_, sum_TD, y_TD, rstd_T);
  }
  // dx = dresidual + gradient through the norm (dresidual may be absent); adds the weight's gradient.
  void backward(StepContext& ctx, const Tensor& dy_TD, const Tensor& x_TD, const Tensor& rstd_T,
                const Tensor& dresidual_TD, const Tensor& dx_TD) const {
    const GradTarget target = ctx.dist.params.grad(weight_);
    ctx.ops.rms_norm_backward(ctx.stream, dy_TD, x_TD, weight_.value, rstd_T, dresidual_TD,
                              target.accumulate, dx_TD, target.grad);
  }

 private:
  const Parameter& weight_;
  double eps_;
};

}  // namespace dstrain
