#include "core/layers/router.h"

namespace dstrain {
namespace {

RouterParams router_params(const ModelConfig& model) {
  RouterParams p;
  p.scoring =
      model.scoring_func == ScoringFunc::softmax ? RouterScoring::softmax : RouterScoring::sigmoid;
  p.group_score = model.topk_method == TopkMethod::noaux_tc ? GroupScore::best_two : GroupScore::best;
  const bool grouped = model.topk_method != TopkMethod::greedy;
  p.groups = grouped ? model.n_group : 1;
  p.groups_per_token = grouped ? model.topk_group : 1;
  p.experts_per_token = model.num_experts_per_tok;
  p.normalize = model.norm_topk_prob;
  p.scale = model.routed_scaling_factor;
  return p;
}

}  // namespace

Router::Router(const ModelConfig& model, const Declare& declare, int moe_index)
    : weight_(declare.matrix("weight", {model.n_routed_experts, model.hidden_size})),
      params_(router_params(model)),
      experts_(model.n_routed_experts),
      moe_index_(moe_index),
      bias_update_speed_(model.bias_update_speed),
      balance_(model.aux_loss_alpha > 0) {
  if (model.topk_method == TopkMethod::noaux_tc)
    bias_ = &declare.buffer("e_score_correction_bias", experts_);
}

RowsOfSequences Router::rows(StepContext& ctx) const {
  return {ctx.dist.tensor.rank() * ctx.local_tokens(), ctx.batch.tokens_per_sequence};
}

void Router::forward(StepContext& ctx, const Tensor& x_tD, RouterSaved& saved) const {
  if (ctx.recomputing) return;
  choose(ctx, x_tD, saved);
  ctx.dist.dispatcher.route(ctx.dist_stream(), experts_, saved.routing, ctx.arena.kept);
  if (!ctx.training) return;
  ctx.ops.count_experts(ctx.stream, saved.routing.indices_TK,
                        ctx.sums.counts_LE.rows(moe_index_, moe_index_ + 1).view({experts_}));
  if (balance_) balance(ctx, saved);
}

void Router::choose(StepContext& ctx, const Tensor& x_tD, RouterSaved& saved) const {
  const int64_t t = x_tD.size(0), K = params_.experts_per_token;
  Arena& kept = ctx.arena.kept;
  saved.scores_TE = kept.make(ctx.stat(), {t, experts_}, "router scores");
  saved.routing.indices_TK = kept.make(DType::i32, {t, K}, "expert indices");
  saved.routing.weights_TK = kept.make(ctx.stat(), {t, K}, "expert weights");
  const Tensor bias_E = bias_ ? bias_->value : Tensor();
  ArenaScope scope(ctx.arena.scratch);
  const Tensor logits_TE = ctx.arena.scratch.make(ctx.stat(), {t, experts_}, "router logits");
  ctx.ops.matmul(ctx.stream, Trans::no, Trans::yes, 1.0, x_tD, weight_.value, 0.0, logits_TE);
  const Tensor recorded_TK =
      ctx.routing_hook ? ctx.routing_hook->recorded(ctx.dist_stream(), moe_index_, t) : Tensor();
  if (recorded_TK.defined()) {
    saved.routing.indices_TK = recorded_TK;
    ctx.ops.router_weights(ctx.stream, logits_TE, params_, recorded_TK, saved.scores_TE,
                           saved.routing.weights_TK);
  } else {
    ctx.ops.router_topk(ctx.stream, logits_TE, bias_E, params_, saved.scores_TE,
                        saved.routing.indices_TK, saved.routing.weights_TK);
  }
  if (ctx.routing_hook)
    ctx.routing_hook->chosen(ctx.dist_stream(), moe_index_, saved.scores_TE, bias_E,
                             saved.routing.indices_TK);
}

void Router::balance(StepContext& ctx, RouterSaved& saved) const {
  const int64_t S = ctx.batch.sequences, K = params_.experts_per_token;
  const DistStream dist = ctx.dist_stream();
  saved.balance_coeff_SE = ctx.arena.kept.make(ctx.stat(), {S, experts_}, "balance coefficients");
  ArenaScope scope(ctx.arena.scratch);
  const Tensor both_XE = ctx.arena.scratch.make(ctx.stat(), {2 * S, experts_}, "balance statistics");
  const Tensor load_SE = both_XE.rows(0, S), prob_SE = both_XE.rows(S, 2 * S);
  ctx.ops.balance_statistics(ctx.stream, saved.scores_TE, saved.routing.indices_TK, rows(ctx), load_SE,
                             prob_SE);
  ctx.dist.sequences.reduce_start(dist, both_XE);
  ctx.dist.sequences.reduce_finish(dist, both_XE);
  ctx.ops.balance_loss(ctx.stream, load_SE, prob_SE, ctx.batch.sequence_length, K, ctx.balance_factor,
                       ctx.sums.balance_1, saved.balance_coeff_SE);
}

void Router::backward_input(StepContext& ctx, const Tensor& dweights_TK, RouterSaved& saved,
                            const Tensor& dx_tD) const {
  ctx.ops.router_backward(ctx.stream, dweights_TK, saved.scores_TE, saved.routing.indices_TK, params_,
                          saved.balance_coeff_SE, rows(ctx), saved.dlogits_TE);
  ctx.ops.matmul(ctx.stream, Trans::no, Trans::no, 1.0, saved.dlogits_TE, weight_.value, 1.0, dx_tD);
}

void Router::backward_weight(StepContext& ctx, const RouterSaved& saved, const Tensor& x_tD) const {
  const GradTarget target = ctx.dist.params.grad(weight_);
  ctx.ops.matmul(ctx.stream, Trans::yes, Trans::no, 1.0, saved.dlogits_TE, x_tD,
                 target.accumulate == Accumulate::add ? 1.0 : 0.0, target.grad);
}

void Router::update_bias(Ops& ops, Stream& stream, const Tensor& counts_LE,
                         const StepScalars* scalars) const {
  if (!bias_ || bias_update_speed_ == 0) return;
  ops.router_bias_update(stream, counts_LE.rows(moe_index_, moe_index_ + 1).view({experts_}),
                         bias_update_speed_, scalars, bias_->value);
}

}  // namespace dstrain
