#include "core/layers/gqa_attention.h"

#include "core/layers/mla_attention.h"
#include "core/layers/rope.h"
#include "core/layers/sequence_parallel.h"

namespace dstrain {

GqaAttention::GqaAttention(const ModelConfig& model, const Declare& declare, int layer)
    : layer_(layer),
      head_dim_(model.gqa_head_dim()),
      queries_per_group_(model.num_attention_heads / model.kv_heads()),
      scale_(attention_scale(model)),
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
  ctx.ops.gqa_qkv(ctx.stream, qkv_TX.view({T, G, m + 2, Q}), rope, ctx.batch.positions_T, saved.q_THQ,
                  saved.k_TGQ, saved.v_TGW);
}

void GqaAttention::forward(StepContext& ctx, const RopeTable& rope, const Tensor& x_tD,
                           AttentionSaved& saved, const Tensor& out_tD) const {
  const int64_t T = ctx.batch.num_tokens(), H = groups_ * queries_per_group_;
  saved.x_tD = x_tD;
  saved.o_THW = ctx.arena.saved.make(ctx.dtype, {T, H, head_dim_}, "attention output");
  saved.lse_TH = ctx.arena.saved.make(ctx.stat(), {T, H}, "log-sum-exp");
  project(ctx, rope, saved, ctx.arena.cheap);

  const DistStream dist = ctx.dist_stream();
  ctx.dist.kv.gather_start(dist, layer_, saved.k_TGQ, saved.v_TGW);
  const KeysValues kv = ctx.dist.kv.gather_finish(dist, layer_, saved.k_TGQ, saved.v_TGW,
                                                  ctx.batch.segments, ctx.arena.scratch);
  ctx.ops.attention(ctx.stream, saved.q_THQ, kv.k_UGQ, kv.v_UGW, kv.segments, scale_, saved.o_THW,
                    saved.lse_TH);
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
  const DistStream dist = ctx.dist_stream();
  const Tensor do_THW = scratch.make(ctx.dtype, {T, G * m, Q}, "d attention output");
  o_proj_.backward_input(ctx, saved.dout_TD, do_THW.view({T, G * m * Q}));

  ctx.dist.kv.gather_start(dist, layer_, saved.k_TGQ, saved.v_TGW);
  const KeysValues kv = ctx.dist.kv.gather_finish(dist, layer_, saved.k_TGQ, saved.v_TGW,
                                                  ctx.batch.segments, scratch);
  const Tensor dq_THQ = scratch.make(ctx.dtype, {T, G * m, Q}, "d queries");
  const Tensor dk_UGQ = scratch.like(kv.k_UGQ, "d keys"), dv_UGW = scratch.like(kv.v_UGW, "d values");
  ctx.ops.attention_backward(ctx.stream, do_THW, saved.q_THQ, kv.k_UGQ, kv.v_UGW, saved.o_THW,
                             saved.lse_TH, kv.segments, scale_, dq_THQ, dk_UGQ, dv_UGW);
  Tensor dk_TGQ, dv_TGW;
  ctx.dist.kv.reduce_start(dist, layer_, dk_UGQ, dv_UGW);
  ctx.dist.kv.reduce_finish(dist, layer_, dk_UGQ, dv_UGW, dk_TGQ, dv_TGW, scratch);
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

std::unique_ptr<Attention> make_attention(const ModelConfig& model, const Declare& declare, int layer) {
  if (model.is_mla()) return std::make_unique<MlaAttention>(model, declare, layer);
  return std::make_unique<GqaAttention>(model, declare, layer);
}

}  // namespace dstrain
