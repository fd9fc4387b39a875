#include "core/layers/moe.h"

namespace dstrain {

Moe::Moe(const ModelConfig& model, const Declare& declare, int moe_index)
    : router_(model, declare.in("gate"), moe_index),
      gate_up_(declare.matrix("experts.gate_up_proj",
                              {model.n_routed_experts, 2, model.moe_intermediate_size,
                               model.hidden_size},
                              {.expert_dim = 0})),
      down_(declare.matrix("experts.down_proj",
                           {model.n_routed_experts, model.hidden_size, model.moe_intermediate_size},
                           {.expert_dim = 0})),
      hidden_(model.hidden_size),
      inner_(gate_up_.local_shape[2]),
      experts_(gate_up_.local_shape[0]),
      experts_per_token_(model.num_experts_per_tok) {
  if (model.n_shared_experts > 0)
    shared_.emplace(declare.in("shared_experts"), model.hidden_size,
                    model.n_shared_experts * model.moe_intermediate_size);
}

void Moe::up(StepContext& ctx, ExpertRound& round, Arena& saved, Arena& scratch) const {
  const int64_t C = round_rows(ctx);
  round.gate_up_C2I = saved.make(ctx.dtype, {C, 2 * inner_}, "experts' gate and up");
  round.h_CI = scratch.make(ctx.dtype, {C, inner_}, "experts' SwiGLU output");
  ctx.ops.ffn_up(ctx.stream, round.x.x_XD, round.x.row_index_R, gate_up_matrix(gate_up_.value),
                 round.x.offsets_E1, round.x.row_weight_R, round.gate_up_C2I, round.h_CI);
}

template <class Work>
void Moe::give_back(StepContext& ctx, const ExpertRound& round, const ExpertResults& results,
                    const Routing& routing, const TokenResults& tokens, const Work& beside) const {
  TokenDispatcher& dispatcher = ctx.dist.dispatcher;
  const DistStream dist = ctx.dist_stream();
  dispatcher.return_start(dist, round.x, results, routing, ctx.arena.scratch);
  beside();
  dispatcher.return_finish(dist, round.x, results, routing, tokens);
}

void Moe::further_round(StepContext& ctx, int i, const Tensor& x_tD, const Routing& routing,
                        ExpertRound& round) const {
  TokenDispatcher& dispatcher = ctx.dist.dispatcher;
  Arena& scratch = ctx.arena.scratch;
  dispatcher.dispatch_start(ctx.dist_stream(), i, x_tD, routing, scratch, scratch);
  round.x = dispatcher.dispatch_finish(ctx.dist_stream(), x_tD, routing);
  up(ctx, round, scratch, scratch);
}

void Moe::forward(StepContext& ctx, const Tensor& x_tD, MoeSaved& saved, const Tensor& out_tD) const {
  saved.x_tD = x_tD;
  router_.forward(ctx, x_tD, saved.router);
  const Routing& routing = saved.router.routing;
  TokenDispatcher& dispatcher = ctx.dist.dispatcher;
  const DistStream dist = ctx.dist_stream();
  Arena& scratch = ctx.arena.scratch;

  // The shared experts' first product runs while rows travel to the experts, the second on their way
  // back.
  dispatcher.dispatch_start(dist, 0, x_tD, routing, ctx.arena.saved, scratch);
  Tensor shared_h_TI;
  if (shared_ && ctx.recomputing) shared_->forward(ctx, x_tD, saved.shared, out_tD);
  if (shared_ && !ctx.recomputing) {
    shared_->begin(ctx, x_tD, saved.shared);
    shared_h_TI = shared_->up(ctx, saved.shared);
  }
  saved.first.x = dispatcher.dispatch_finish(dist, x_tD, routing);
  // Under full recomputation `saved` is scratch, too: what backward needs lies below the scope.
  up(ctx, saved.first, ctx.arena.saved, scratch);
  if (ctx.recomputing) return;

  const int rounds = dispatcher.rounds(dist, routing);
  ExpertRound round = saved.first;
  for (int i = 0; i < rounds; ++i) {
    ArenaScope scope(scratch);
    if (i > 0) further_round(ctx, i, x_tD, routing, round);
    const Tensor y_CD = scratch.make(ctx.dtype, {round_rows(ctx), hidden_}, "expert outputs");
    ctx.ops.grouped_matmul(ctx.stream, round.h_CI, {}, down_.value, round.x.offsets_E1, y_CD);
    give_back(ctx, round, {.y_RD = y_CD}, routing,
              {.addend_TD = shared_ || i > 0 ? out_tD : Tensor(), .out_TD = out_tD}, [&] {
                if (shared_ && i == 0) shared_->down(ctx, shared_h_TI, out_tD);
              });
  }
}

void Moe::restore(StepContext& ctx, const Tensor& x_tD, MoeSaved& saved) const {
  saved.x_tD = x_tD;
  if (shared_) saved.shared.x_tD = x_tD;
  if (ctx.dist.dispatcher.local()) saved.first.x.x_XD = x_tD;
}

void Moe::round_backward(StepContext& ctx, const ExpertRound& round, const ExpertResults& grads) const {
  ctx.ops.ffn_down_backward_input(ctx.stream, round.dy_XD, round.x.row_index_R, down_.value,
                                  round.x.offsets_E1, round.gate_up_C2I, round.x.row_weight_R,
                                  round.dgate_up_C2I, round.h_CI,
                                  grads.dweight_R1.view({grads.dweight_R1.size(0)}));
  ctx.ops.grouped_matmul_backward_input(ctx.stream, round.dgate_up_C2I, {},
                                        gate_up_matrix(gate_up_.value), round.x.offsets_E1, grads.y_RD);
}

void Moe::backward_input(StepContext& ctx, const Tensor& dout_tD, MoeSaved& saved,
                         const Tensor& dx_tD) const {
  const Routing& routing = saved.router.routing;
  TokenDispatcher& dispatcher = ctx.dist.dispatcher;
  const DistStream dist = ctx.dist_stream();
  const int64_t C = round_rows(ctx);
  Arena& grads = ctx.arena.grads;
  Arena& scratch = ctx.arena.scratch;
  saved.router.dlogits_TE = grads.like(saved.router.scores_TE, "d router logits");

  dispatcher.dispatch_again_start(dist, saved.first.x, dout_tD, routing, grads, scratch);
  if (shared_) shared_->down_backward_input(ctx, dout_tD, saved.shared);
  saved.first.dy_XD = dispatcher.dispatch_again_finish(dist, dout_tD);
  saved.first.dgate_up_C2I = grads.make(ctx.dtype, {C, 2 * inner_}, "experts' d gate and up");
  saved.first.h_CI = grads.make(ctx.dtype, {C, inner_}, "experts' SwiGLU output");

  ArenaScope scope(scratch);
  const Tensor dweights_TK = scratch.like(routing.weights_TK, "d expert weights");
  const int rounds = dispatcher.rounds(dist, routing);
  for (int i = 0; i < rounds; ++i) {
    ExpertRound further;
    ExpertRound& round = i == 0 ? saved.first : further;
    ArenaScope round_scope(scratch);
    if (i > 0) {
      further_round(ctx, i, saved.x_tD, routing, round);
      round.dgate_up_C2I = scratch.like(round.gate_up_C2I, "experts' d gate and up");
      dispatcher.dispatch_again_start(dist, round.x, dout_tD, routing, scratch, scratch);
      round.dy_XD = dispatcher.dispatch_again_finish(dist, dout_tD);
    }
    const ExpertResults results{scratch.make(ctx.dtype, {C, hidden_}, "d expert inputs"),
                                scratch.make(ctx.stat(), {C, 1}, "d row weight")};
    round_backward(ctx, round, results);
    const TokenResults tokens{shared_ || i > 0 ? dx_tD : Tensor(), dx_tD, dweights_TK};
    give_back(ctx, round, results, routing, tokens, [&] {
      if (shared_ && i == 0) shared_->up_backward_input(ctx, saved.shared, dx_tD);
      if (i > 0) round_backward_weight(ctx, round);
    });
  }
  router_.backward_input(ctx, dweights_TK, saved.router, dx_tD);
}

void Moe::round_backward_weight(StepContext& ctx, const ExpertRound& round) const {
  const Tensor& offsets_E1 = round.x.offsets_E1;
  const GradTarget down = ctx.dist.params.grad(down_);
  ctx.ops.grouped_matmul_backward_weight(ctx.stream, round.dy_XD, round.x.row_index_R, round.h_CI, {},
                                         offsets_E1, down.accumulate, down.grad);
  const GradTarget gate_up = ctx.dist.params.grad(gate_up_);
  ctx.ops.grouped_matmul_backward_weight(ctx.stream, round.dgate_up_C2I, {}, round.x.x_XD,
                                         round.x.row_index_R, offsets_E1, gate_up.accumulate,
                                         gate_up_matrix(gate_up.grad));
}

void Moe::backward_weight(StepContext& ctx, const MoeSaved& saved) const {
  round_backward_weight(ctx, saved.first);
  if (shared_) shared_->backward_weight(ctx, saved.shared);
  router_.backward_weight(ctx, saved.router, saved.x_tD);
}

}  // namespace dstrain
