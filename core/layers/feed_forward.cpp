#include "core/layers/feed_forward.h"

#include "core/layers/sequence_parallel.h"

namespace dstrain {

FeedForward::FeedForward(const Declare& declare, int64_t hidden_size, int64_t intermediate_size)
    : gate_up_(declare.matrix("gate_up_proj.weight", {2, intermediate_size, hidden_size},
                              {.tensor_dim = 1})),
      down_(declare.matrix("down_proj.weight", {hidden_size, intermediate_size}, {.tensor_dim = 1})),
      hidden_(hidden_size),
      inner_(gate_up_.local_shape[1]) {}

void FeedForward::forward(StepContext& ctx, const Tensor& x_tD, FeedForwardSaved& saved,
                          const Tensor& out_tD) const {
  begin(ctx, x_tD, saved);
  ArenaScope scope(ctx.arena.scratch);
  const Tensor h_TI = up(ctx, saved);
  if (!ctx.recomputing) down(ctx, h_TI, out_tD);
}

void FeedForward::begin(StepContext& ctx, const Tensor& x_tD, FeedForwardSaved& saved) const {
  saved.x_tD = x_tD;
  saved.gate_up_T2I =
      ctx.arena.saved.make(ctx.dtype, {ctx.batch.num_tokens(), 2 * inner_}, "gate and up");
}

Tensor FeedForward::up(StepContext& ctx, const FeedForwardSaved& saved) const {
  Arena& scratch = ctx.arena.scratch;
  const Tensor h_TI = scratch.make(ctx.dtype, {ctx.batch.num_tokens(), inner_}, "SwiGLU output");
  ArenaScope scope(scratch);
  const Tensor x_TD = gather_tokens(ctx, saved.x_tD, scratch, "all tokens");
  ctx.ops.ffn_up(ctx.stream, x_TD, {}, gate_up_.value.view({1, 2 * inner_, hidden_}), {}, {},
                 saved.gate_up_T2I, h_TI);
  return h_TI;
}

void FeedForward::down(StepContext& ctx, const Tensor& h_TI, const Tensor& out_tD) const {
  ArenaScope scope(ctx.arena.scratch);
  const Tensor partial_TD = partial_sums(ctx, out_tD, ctx.arena.scratch, "partial projection");
  ctx.ops.grouped_matmul(ctx.stream, h_TI, {}, down_.value.view({1, hidden_, inner_}), {}, partial_TD);
  reduce_tokens(ctx, partial_TD, out_tD);
}

void FeedForward::backward_input(StepContext& ctx, const Tensor& dout_tD, FeedForwardSaved& saved,
                                 const Tensor& dx_tD) const {
  down_backward_input(ctx, dout_tD, saved);
  up_backward_input(ctx, saved, dx_tD);
}

void FeedForward::down_backward_input(StepContext& ctx, const Tensor& dout_tD,
                                      FeedForwardSaved& saved) const {
  const int64_t T = ctx.batch.num_tokens();
  Arena& grads = ctx.arena.grads;
  saved.dout_TD = gather_tokens(ctx, dout_tD, grads, "d output of all tokens");
  saved.x_TD = gather_tokens(ctx, saved.x_tD, grads, "all tokens");
  saved.dgate_up_T2I = grads.make(ctx.dtype, {T, 2 * inner_}, "d gate and up");
  saved.h_TI = grads.make(ctx.dtype, {T, inner_}, "SwiGLU output");
  ctx.ops.ffn_down_backward_input(ctx.stream, saved.dout_TD, {}, down_.value.view({1, hidden_, inner_}),
                                  {}, saved.gate_up_T2I, {}, saved.dgate_up_T2I, saved.h_TI, {});
}

void FeedForward::up_backward_input(StepContext& ctx, const FeedForwardSaved& saved,
                                    const Tensor& dx_tD) const {
  ArenaScope scope(ctx.arena.scratch);
  const Tensor partial_TD = partial_sums(ctx, dx_tD, ctx.arena.scratch, "partial d input");
  ctx.ops.grouped_matmul_backward_input(ctx.stream, saved.dgate_up_T2I, {},
                                        gate_up_.value.view({1, 2 * inner_, hidden_}), {}, partial_TD);
  reduce_tokens(ctx, partial_TD, dx_tD);
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
