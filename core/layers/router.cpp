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

void Router::forward(StepContext& ctx, const Tensor& x_TD, RouterSaved& saved) const {
  if (ctx.recomputing) return;
  const int64_t T = x_TD.size(0), K = params_.experts_per_token;
  Arena& kept = ctx.arena.kept;
  saved.scores_TE = kept.make(ctx.stat(), {T, experts_}, "router scores");
  saved.routing.indices_TK = kept.make(DType::i32, {T, K}, "expert indices");
  saved.routing.weights_TK = kept.make(ctx.stat(), {T, K}, "expert weights");
  {
    ArenaScope scope(ctx.arena.scratch);
    const Tensor logits_TE = ctx.arena.scratch.make(ctx.stat(), {T, experts_}, "router logits");
    ctx.ops.matmul(ctx.stream, Trans::no, Trans::yes, 1.0, x_TD, weight_.value, 0.0, logits_TE);
    ctx.ops.router_topk(ctx.stream, logits_TE, bias_ ? bias_->value : Tensor(), params_,
                        saved.scores_TE, saved.routing.indices_TK, saved.routing.weights_TK);
  }
  ctx.dist.dispatcher.route(ctx.dist_stream(), experts_, saved.routing, kept);
  if (!ctx.training) return;
  ctx.ops.count_experts(ctx.stream, saved.routing.indices_TK,
                        ctx.sums.counts_LE.rows(moe_index_, moe_index_ + 1).view({experts_}));
  if (!balance_) return;
  const int64_t S = ctx.batch.sequences;
  saved.balance_coeff_SE = kept.make(ctx.stat(), {S, experts_}, "balance coefficients");
  ArenaScope scope(ctx.arena.scratch);
  const Tensor load_SE = ctx.arena.scratch.make(ctx.stat(), {S, experts_}, "balance load");
  const Tensor prob_SE = ctx.arena.scratch.make(ctx.stat(), {S, experts_}, "balance probability");
  ctx.ops.balance_statistics(ctx.stream, saved.scores_TE, saved.routing.indices_TK, load_SE, prob_SE);
  ctx.ops.balance_loss(ctx.stream, load_SE, prob_SE, ctx.batch.tokens_per_sequence, K,
                       ctx.balance_factor, ctx.sums.balance_1, saved.balance_coeff_SE);
}

void Router::backward_input(StepContext& ctx, const Tensor& dweights_TK, RouterSaved& saved,
                            const Tensor& dx_TD) const {
  ctx.ops.router_backward(ctx.stream, dweights_TK, saved.scores_TE, saved.routing.indices_TK, params_,
                          saved.balance_coeff_SE, saved.dlogits_TE);
  ctx.ops.matmul(ctx.stream, Trans::no, Trans::no, 1.0, saved.dlogits_TE, weight_.value, 1.0, dx_TD);
}

void Router::backward_weight(StepContext& ctx, const RouterSaved& saved, const Tensor& x_TD) const {
  const GradTarget target = ctx.dist.params.grad(weight_);
  ctx.ops.matmul(ctx.stream, Trans::yes, Trans::no, 1.0, saved.dlogits_TE, x_TD,
                 target.accumulate == Accumulate::add ? 1.0 : 0.0, target.grad);
}

void Router::update_bias(Ops& ops, Stream& stream, const Tensor& counts_LE,
                         const StepScalars* scalars) const {
  if (!bias_ || bias_update_speed_ == 0) return;
  ops.router_bias_update(stream, counts_LE.rows(moe_index_, moe_index_ + 1).view({experts_}),
                         bias_update_speed_, scalars, bias_->value);
}

}  // namespace dstrain
