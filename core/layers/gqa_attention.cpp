#include "core/layers/gqa_attention.h"

#include "core/layers/mla_attention.h"
#include "core/layers/rope.h"
#include "core/layers/sequence_parallel.h"

namespace dstrain {

GqaAttention::GqaAttention(const ModelConfig& model, const Declare& declare, int layer)
    : call_{layer, attention_scale(model)},
      head_dim_(model.gqa_head_dim()),
      queries_per_group_(model.num_attention_heads / model.kv_heads()),
      qkv_proj_(declare.in("qkv_proj"),
                {model.kv_heads(), queries_per_group_ + 2, head_dim_, model.hidden_size},
                {.tensor_dim = 0}, model.attention_bias ? Bias::add : Bias::none),
      o_proj_(declare.in("o_proj"), {model.hidden_size, model.num_attention_heads * head_dim_},
              {.tensor_dim = 1}, model.has_attention_output_bias() ? Bias::add : Bias::none),
      groups_(qkv_proj_.out_size() / ((queries_per_group_ + 2) * head_dim_)) {}

void GqaAttention::project(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved,
                           Arena& arena) const {
  const int64_t T = ctx.batch.num_tokens(), G = groups_, m = queries_per_group_, Q = head_dim_;
  saved.q_THQ = arena.make(ctx.dtype, {T, G * m, Q}, "queries");
  saved.k_TGQ = arena.make(ctx.dtype, {T, G, Q}, "keys");
  saved.v_TGW = arena.make(ctx.dtype, {T, G, Q}, "values");
  ArenaScope scope(ctx.arena.scratch);
  const Tensor x_TD = gather_tokens(ctx, saved.x_tD, ctx.arena.scratch, "all tokens");
  const Tensor qkv_TX = qkv_proj_.forward(ctx, x_TD, ctx.arena.scratch, "queries, keys, values");
  ctx.ops.gqa_qkv(ctx.stream, qkv_TX.view({T, G, m + 2, Q}), rope, ctx.batch.positions_T,
                  saved.q_THQ, saved.k_TGQ, saved.v_TGW);
}

void GqaAttention::forward(StepContext& ctx, const RopeTable& rope, const Tensor& x_tD,
                           AttentionSaved& saved, const Tensor& out_tD) const {
  const int64_t T = ctx.batch.num_tokens(), H = groups_ * queries_per_group_;
  saved.x_tD = x_tD;
  saved.o_THW = ctx.arena.saved.make(ctx.dtype, {T, H, head_dim_}, "attention output");
  saved.lse_TH = ctx.arena.saved.make(ctx.stat(), {T, H}, "log-sum-exp");
  project(ctx, rope, saved, ctx.arena.cheap);

  attention_with_peers(ctx, call_, {saved.k_TGQ, saved.v_TGW}, saved,
                       [](const KeyRows& rows, const PeerTokens&, const auto& attention) {
                         attention(rows[0], rows[1]);
                       });
  o_proj_.forward_reduced(ctx, saved.o_THW.view({T, H * head_dim_}), out_tD);
}

void GqaAttention::restore(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved) const {
  project(ctx, rope, saved, ctx.arena.scratch);
}

void GqaAttention::backward_input(StepContext& ctx, const RopeTable& rope, const Tensor& dout_tD,
                                  AttentionSaved& saved, const Tensor& dx_tD) const {
  const int64_t T = ctx.batch.num_tokens(), G = groups_, m = queries_per_group_, Q = head_dim_;
  saved.dout_tD = dout_tD;
  saved.dout_TD = gather_tokens(ctx, dout_tD, ctx.arena.grads, "d output of all tokens");
  saved.x_TD = gather_tokens(ctx, saved.x_tD, ctx.arena.grads, "all tokens");
  saved.dq_TX = ctx.arena.grads.make(ctx.dtype, {T, G * (m + 2) * Q}, "d queries, keys, values");

  ArenaScope scope(ctx.arena.scratch);
  Arena& scratch = ctx.arena.scratch;
  KvExchange& kv = ctx.dist.kv;
  kv.pass_start(ctx.dist_stream(), {saved.k_TGQ, saved.v_TGW}, ctx.batch.sequences,
                KvExchange::Returns::gradients, scratch);
  const Tensor do_THW = scratch.make(ctx.dtype, {T, G * m, Q}, "d attention output");
  o_proj_.backward_input(ctx, saved.dout_TD, do_THW.view({T, G * m * Q}));

  const Tensor dq_THQ = scratch.make(ctx.dtype, {T, G * m, Q}, "d queries");
  const Tensor dq_by_peers_THQ = attention_backward_of_peers(
      ctx, call_, saved, do_THW, dq_THQ,
      [](const KvExchange::Peer& peer, const PeerTokens&, const auto& attention) {
        attention(peer.rows[0], peer.rows[1], peer.gradients[0], peer.gradients[1]);
      });
  const Tensor dk_TGQ = scratch.like(saved.k_TGQ, "d keys"),
               dv_TGW = scratch.like(saved.v_TGW, "d values");
  attention_backward_of_own(ctx, call_, saved, do_THW, dq_by_peers_THQ, dq_THQ, dk_TGQ, dv_TGW);
  kv.pass_finish(ctx.dist_stream(), {dk_TGQ, dv_TGW});
  ctx.ops.gqa_qkv_backward(ctx.stream, dq_THQ, dk_TGQ, dv_TGW, rope, ctx.batch.positions_T,
                           saved.dq_TX.view({T, G, m + 2, Q}));
  const Tensor partial_TD = partial_sums(ctx, dx_tD, scratch, "partial d input");
  qkv_proj_.backward_input(ctx, saved.dq_TX, partial_TD);
  reduce_tokens(ctx, partial_TD, dx_tD);
}

void GqaAttention::backward_weight(StepContext& ctx, const AttentionSaved& saved) const {
  const int64_t T = ctx.batch.num_tokens(), H = groups_ * queries_per_group_;
  o_proj_.backward_weight(ctx, saved.dout_TD, saved.o_THW.view({T, H * head_dim_}), saved.dout_tD);
  qkv_proj_.backward_weight(ctx, saved.dq_TX, saved.x_TD);
}

std::unique_ptr<Attention> make_attention(const ModelConfig& model, const Declare& declare,
                                          int layer) {
  if (model.is_mla()) return std::make_unique<MlaAttention>(model, declare, layer);
  return std::make_unique<GqaAttention>(model, declare, layer);
}

}  // namespace dstrain
