#include "core/layers/moe.h"

namespace dstrain {

Moe::Moe(const ModelConfig& model, const Declare& declare, int moe_index)
    : router_(model, declare.in("gate"), moe_index),
      gate_up_(declare.matrix("experts.gate_up_proj",
                              {model.n_routed_experts, 2, model.moe_intermediate_size,
                               model.hidden_size},
                              {.tensor_dim = 2, .expert_dim = 0})),
      down_(declare.matrix("experts.down_proj",
                           {model.n_routed_experts, model.hidden_size, model.moe_intermediate_size},
                           {.tensor_dim = 2, .expert_dim = 0})),
      hidden_(model.hidden_size),
      inner_(gate_up_.local_shape[2]),
      experts_(gate_up_.local_shape[0]),
      experts_per_token_(model.num_experts_per_tok) {
  if (model.n_shared_experts > 0)
    shared_.emplace(declare.in("shared_experts"), model.hidden_size,
                    model.n_shared_experts * model.moe_intermediate_size);
}

void Moe::forward(StepContext& ctx, const Tensor& x_TD, MoeSaved& saved, const Tensor& out_TD) const {
  saved.x_TD = x_TD;
  router_.forward(ctx, x_TD, saved.router);
  const Routing& routing = saved.router.routing;
  const DistStream dist = ctx.dist_stream();
  const int64_t R = ctx.dist.dispatcher.max_rows(x_TD.size(0), experts_per_token_);

  ctx.dist.dispatcher.dispatch_start(dist, x_TD, routing);
  if (shared_) shared_->forward(ctx, x_TD, saved.shared, out_TD);
  saved.x_rows = ctx.dist.dispatcher.dispatch_finish(dist, x_TD, routing, ctx.arena.saved);
  saved.gate_up_R2I = ctx.arena.saved.make(ctx.dtype, {R, 2 * inner_}, "experts' gate and up");

  ArenaScope scope(ctx.arena.scratch);
  const Tensor h_RI = ctx.arena.scratch.make(ctx.dtype, {R, inner_}, "experts' SwiGLU output");
  const Tensor y_RD = ctx.arena.scratch.make(ctx.dtype, {R, hidden_}, "expert outputs");
  ctx.ops.ffn_up(ctx.stream, saved.x_rows.x_XD, saved.x_rows.row_index_R,
                 gate_up_matrix(gate_up_.value), routing.offsets_E1, routing.row_weight_R,
                 saved.gate_up_R2I, h_RI);
  if (ctx.recomputing) return;
  ctx.ops.grouped_matmul(ctx.stream, h_RI, {}, down_.value, routing.offsets_E1, y_RD);
  ctx.dist.dispatcher.combine_start(dist, y_RD, routing);
  ctx.dist.dispatcher.combine_finish(dist, y_RD, routing, shared_ ? out_TD : Tensor(), out_TD);
}

void Moe::restore(const Tensor& x_TD, MoeSaved& saved) const {
  saved.x_TD = x_TD;
  if (shared_) saved.shared.x_TD = x_TD;
  if (saved.x_rows.row_index_R.defined()) saved.x_rows.x_XD = x_TD;
}

void Moe::backward_input(StepContext& ctx, const Tensor& dout_TD, MoeSaved& saved,
                         const Tensor& dx_TD) const {
  const Routing& routing = saved.router.routing;
  const DistStream dist = ctx.dist_stream();
  const int64_t R = saved.gate_up_R2I.size(0);
  Arena& grads = ctx.arena.grads;
  saved.dgate_up_R2I = grads.make(ctx.dtype, {R, 2 * inner_}, "experts' d gate and up");
  saved.h_RI = grads.make(ctx.dtype, {R, inner_}, "experts' SwiGLU output");
  saved.router.dlogits_TE = grads.like(saved.router.scores_TE, "d router logits");

  ctx.dist.dispatcher.combine_backward_start(dist, dout_TD, routing);
  if (shared_) shared_->backward_input(ctx, dout_TD, saved.shared, dx_TD);
  saved.dy_rows = ctx.dist.dispatcher.combine_backward_finish(dist, dout_TD, routing, grads);

  ArenaScope scope(ctx.arena.scratch);
  Arena& scratch = ctx.arena.scratch;
  const Tensor drow_weight_R = scratch.make(ctx.stat(), {R}, "d row weight");
  ctx.ops.ffn_down_backward_input(ctx.stream, saved.dy_rows.x_XD, saved.dy_rows.row_index_R,
                                  down_.value, routing.offsets_E1, saved.gate_up_R2I,
                                  routing.row_weight_R, saved.dgate_up_R2I, saved.h_RI, drow_weight_R);
  const Tensor dx_RD = scratch.make(ctx.dtype, {R, hidden_}, "d expert inputs");
  ctx.ops.grouped_matmul_backward_input(ctx.stream, saved.dgate_up_R2I, {},
                                        gate_up_matrix(gate_up_.value), routing.offsets_E1, dx_RD);
  const Tensor dweights_TK = scratch.like(routing.weights_TK, "d expert weights");
  ctx.dist.dispatcher.dispatch_backward_start(dist, dx_RD, drow_weight_R, routing);
  ctx.dist.dispatcher.dispatch_backward_finish(dist, dx_RD, drow_weight_R, routing,
                                               shared_ ? dx_TD : Tensor(), dx_TD, dweights_TK);
  router_.backward_input(ctx, dweights_TK, saved.router, dx_TD);
}

void Moe::backward_weight(StepContext& ctx, const MoeSaved& saved) const {
  const Tensor& offsets_E1 = saved.router.routing.offsets_E1;
  const GradTarget down = ctx.dist.params.grad(down_);
  ctx.ops.grouped_matmul_backward_weight(ctx.stream, saved.dy_rows.x_XD, saved.dy_rows.row_index_R,
                                         saved.h_RI, {}, offsets_E1, down.accumulate, down.grad);
  const GradTarget gate_up = ctx.dist.params.grad(gate_up_);
  ctx.ops.grouped_matmul_backward_weight(ctx.stream, saved.dgate_up_R2I, {}, saved.x_rows.x_XD,
                                         saved.x_rows.row_index_R, offsets_E1, gate_up.accumulate,
                                         gate_up_matrix(gate_up.grad));
  if (shared_) shared_->backward_weight(ctx, saved.shared);
  router_.backward_weight(ctx, saved.router, saved.x_TD);
}

}  // namespace dstrain
