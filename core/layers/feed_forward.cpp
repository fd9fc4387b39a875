#include "core/layers/feed_forward.h"

namespace dstrain {

FeedForward::FeedForward(const Declare& declare, int64_t hidden_size, int64_t intermediate_size)
    : gate_up_(declare.matrix("gate_up_proj.weight", {2, intermediate_size, hidden_size},
                              {.tensor_dim = 1})),
      down_(declare.matrix("down_proj.weight", {hidden_size, intermediate_size}, {.tensor_dim = 1})),
      hidden_(hidden_size),
      inner_(gate_up_.local_shape[1]) {}

void FeedForward::forward(StepContext& ctx, const Tensor& x_TD, FeedForwardSaved& saved,
                          const Tensor& out_TD) const {
  const int64_t T = x_TD.size(0);
  saved.x_TD = x_TD;
  saved.gate_up_T2I = ctx.arena.saved.make(ctx.dtype, {T, 2 * inner_}, "gate and up");
  ArenaScope scope(ctx.arena.scratch);
  const Tensor h_TI = ctx.arena.scratch.make(ctx.dtype, {T, inner_}, "SwiGLU output");
  ctx.ops.ffn_up(ctx.stream, x_TD, {}, gate_up_.value.view({1, 2 * inner_, hidden_}), {}, {},
                 saved.gate_up_T2I, h_TI);
  if (ctx.recomputing) return;
  ctx.ops.grouped_matmul(ctx.stream, h_TI, {}, down_.value.view({1, hidden_, inner_}), {}, out_TD);
}

void FeedForward::backward_input(StepContext& ctx, const Tensor& dout_TD, FeedForwardSaved& saved,
                                 const Tensor& dx_TD) const {
  const int64_t T = dout_TD.size(0);
  saved.dout_TD = dout_TD;
  saved.dgate_up_T2I = ctx.arena.grads.make(ctx.dtype, {T, 2 * inner_}, "d gate and up");
  saved.h_TI = ctx.arena.grads.make(ctx.dtype, {T, inner_}, "SwiGLU output");
  ctx.ops.ffn_down_backward_input(ctx.stream, dout_TD, {}, down_.value.view({1, hidden_, inner_}), {},
                                  saved.gate_up_T2I, {}, saved.dgate_up_T2I, saved.h_TI, {});
  ctx.ops.grouped_matmul_backward_input(ctx.stream, saved.dgate_up_T2I, {},
                                        gate_up_.value.view({1, 2 * inner_, hidden_}), {}, dx_TD);
}

void FeedForward::backward_weight(StepContext& ctx, const FeedForwardSaved& saved) const {
  const GradTarget down = ctx.dist.params.grad(down_);
  ctx.ops.grouped_matmul_backward_weight(ctx.stream, saved.dout_TD, {}, saved.h_TI, {}, {},
                                         down.accumulate, down.grad.view({1, hidden_, inner_}));
  const GradTarget gate_up = ctx.dist.params.grad(gate_up_);
  ctx.ops.grouped_matmul_backward_weight(ctx.stream, saved.dgate_up_T2I, {}, saved.x_TD, {}, {},
                                         gate_up.accumulate,
                                         gate_up.grad.view({1, 2 * inner_, hidden_}));
}

}  // namespace dstrain
