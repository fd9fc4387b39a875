#include "core/layers/linear.h"

#include "core/layers/sequence_parallel.h"

namespace dstrain {

Linear::Linear(const Declare& declare, std::vector<int64_t> shape, ShardSpec shard, Bias bias)
    : weight_(declare.matrix("weight", shape, shard)) {
  in_ = weight_.local_shape.back();
  out_ = weight_.numel() / in_;
  if (bias == Bias::none) return;
  // A cut input leaves the bias whole: it is added once, after the sum over ranks.
  const bool input_cut = shard.tensor_dim == static_cast<int>(shape.size()) - 1;
  shape.pop_back();
  bias_ = &declare.bias("bias", shape, input_cut ? ShardSpec{} : shard);
}

Tensor Linear::forward(StepContext& ctx, const Tensor& x_TI, Arena& arena, const char* tag) const {
  const Tensor y_TO = arena.make(ctx.dtype, {x_TI.size(0), out_}, tag);
  forward_into(ctx, x_TI, y_TO);
  return y_TO;
}

void Linear::forward_into(StepContext& ctx, const Tensor& x_TI, const Tensor& y_TO) const {
  ctx.ops.matmul(ctx.stream, Trans::no, Trans::yes, 1.0, x_TI, matrix(weight_.value), 0.0, y_TO);
  if (bias_) ctx.ops.add_bias(ctx.stream, y_TO, bias_->value.view({out_}));
}

void Linear::forward_reduced(StepContext& ctx, const Tensor& x_TI, const Tensor& y_tO) const {
  ArenaScope scope(ctx.arena.scratch);
  const Tensor y_TO = partial_sums(ctx, y_tO, ctx.arena.scratch, "partial projection");
  ctx.ops.matmul(ctx.stream, Trans::no, Trans::yes, 1.0, x_TI, matrix(weight_.value), 0.0, y_TO);
  reduce_tokens(ctx, y_TO, y_tO);
  if (bias_) ctx.ops.add_bias(ctx.stream, y_tO, bias_->value.view({out_}));
}

void Linear::backward_input(StepContext& ctx, const Tensor& dy_TO, const Tensor& dx_TI,
                            Accumulate accumulate) const {
  ctx.ops.matmul(ctx.stream, Trans::no, Trans::no, 1.0, dy_TO, matrix(weight_.value),
                 accumulate == Accumulate::add ? 1.0 : 0.0, dx_TI);
}

void Linear::backward_weight(StepContext& ctx, const Tensor& dy_TO, const Tensor& x_TI,
                             const Tensor& dy_tO) const {
  const GradTarget target = ctx.dist.params.grad(weight_);
  ctx.ops.matmul(ctx.stream, Trans::yes, Trans::no, 1.0, dy_TO, x_TI,
                 target.accumulate == Accumulate::add ? 1.0 : 0.0, matrix(target.grad));
  if (!bias_) return;
  const GradTarget bias = ctx.dist.params.grad(*bias_);
  ctx.ops.bias_backward(ctx.stream, dy_tO, bias.accumulate, bias.grad.view({out_}));
}

}  // namespace dstrain
