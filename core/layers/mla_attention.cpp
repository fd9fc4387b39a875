#include "core/layers/mla_attention.h"

#include "core/layers/rope.h"
#include "core/layers/sequence_parallel.h"

namespace dstrain {

MlaAttention::MlaAttention(const ModelConfig& model, const Declare& declare, int layer)
    : layer_(layer),
      nope_(model.qk_nope_head_dim),
      rope_(model.qk_rope_head_dim),
      v_dim_(model.v_head_dim),
      kv_rank_(model.kv_lora_rank),
      scale_(attention_scale(model)),
      kv_a_proj_(declare.in("kv_a_proj_with_mqa"), {kv_rank_ + rope_, model.hidden_size}, {},
                 model.attention_bias ? Bias::add : Bias::none),
      kv_a_norm_(declare.in("kv_a_layernorm"), kv_rank_, model.rms_norm_eps),
      kv_b_proj_(declare.in("kv_b_proj"), {model.num_attention_heads, nope_ + v_dim_, kv_rank_},
                 {.tensor_dim = 0}),
      o_proj_(declare.in("o_proj"), {model.hidden_size, model.num_attention_heads * v_dim_},
              {.tensor_dim = 1}, model.attention_bias ? Bias::add : Bias::none),
      heads_(kv_b_proj_.out_size() / (nope_ + v_dim_)) {
  const int64_t H = model.num_attention_heads, D = model.hidden_size, Q = nope_ + rope_;
  if (model.q_lora_rank == 0) {
    q_proj_.emplace(declare.in("q_proj"), std::vector<int64_t>{H, Q, D}, ShardSpec{.tensor_dim = 0});
    return;
  }
  q_a_proj_.emplace(declare.in("q_a_proj"), std::vector<int64_t>{model.q_lora_rank, D}, ShardSpec{},
                    model.attention_bias ? Bias::add : Bias::none);
  q_a_norm_.emplace(declare.in("q_a_layernorm"), model.q_lora_rank, model.rms_norm_eps);
  q_b_proj_.emplace(declare.in("q_b_proj"), std::vector<int64_t>{H, Q, model.q_lora_rank},
                    ShardSpec{.tensor_dim = 0});
}

void MlaAttention::expand(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved, Arena& arena,
                          bool rotate_q) const {
  const int64_t T = ctx.batch.num_tokens(), H = heads_, Q = nope_ + rope_;
  saved.kva_TX = gather_tokens(ctx, saved.kva_tX, arena, "latent and shared key of all tokens");
  if (q_b_proj_) {
    saved.qa_TM = gather_tokens(ctx, saved.qa_tM, arena, "compressed queries of all tokens");
    saved.qan_TM = arena.like(saved.qa_TM, "normed compressed queries");
    saved.qa_rstd_T = arena.make(ctx.stat(), {T}, "query rstd");
    q_a_norm_->forward(ctx, saved.qa_TM, saved.qan_TM, saved.qa_rstd_T);
    saved.q_THQ = q_b_proj_->forward(ctx, saved.qan_TM, arena, "queries").view({T, H, Q});
  }
  const Tensor latent_TL = saved.kva_TX.columns(0, kv_rank_);
  const Tensor k_rope_TP = saved.kva_TX.columns(kv_rank_, kv_rank_ + rope_);
  saved.kvn_TL = arena.make(ctx.dtype, {T, kv_rank_}, "normed latent");
  saved.kv_rstd_T = arena.make(ctx.stat(), {T}, "latent rstd");
  kv_a_norm_.forward(ctx, latent_TL, saved.kvn_TL, saved.kv_rstd_T);
  saved.k_TGQ = arena.make(ctx.dtype, {T, H, Q}, "keys");
  saved.v_TGW = arena.make(ctx.dtype, {T, H, v_dim_}, "values");

  ArenaScope scope(ctx.arena.scratch);
  // Scratch may be `arena` itself: keys and values were made before the scope was opened.
  const Tensor kv_b_TX = kv_b_proj_.forward(ctx, saved.kvn_TL, ctx.arena.scratch, "keys and values");
  ctx.ops.mla_qkv(ctx.stream, rotate_q ? saved.q_THQ : Tensor(), k_rope_TP,
                  kv_b_TX.view({T, H, nope_ + v_dim_}), rope, ctx.batch.positions_T, saved.k_TGQ,
                  saved.v_TGW);
}

void MlaAttention::forward(StepContext& ctx, const RopeTable& rope, const Tensor& x_tD,
                           AttentionSaved& saved, const Tensor& out_tD) const {
  const int64_t T = ctx.batch.num_tokens(), H = heads_;
  saved.x_tD = x_tD;
  if (q_a_proj_) {
    saved.qa_tM = q_a_proj_->forward(ctx, x_tD, ctx.arena.saved, "compressed queries");
  } else {
    saved.q_THQ = ctx.arena.saved.make(ctx.dtype, {T, H, nope_ + rope_}, "queries");
    ArenaScope scope(ctx.arena.scratch);
    const Tensor x_TD = gather_tokens(ctx, x_tD, ctx.arena.scratch, "all tokens");
    q_proj_->forward_into(ctx, x_TD, saved.q_THQ.view({T, H * (nope_ + rope_)}));
  }
  saved.kva_tX = kv_a_proj_.forward(ctx, x_tD, ctx.arena.saved, "latent and shared key");
  saved.o_THW = ctx.arena.saved.make(ctx.dtype, {T, H, v_dim_}, "attention output");
  saved.lse_TH = ctx.arena.saved.make(ctx.stat(), {T, H}, "log-sum-exp");
  expand(ctx, rope, saved, ctx.arena.cheap, true);

  const DistStream dist = ctx.dist_stream();
  ctx.dist.kv.gather_start(dist, layer_, saved.k_TGQ, saved.v_TGW);
  const KeysValues kv = ctx.dist.kv.gather_finish(dist, layer_, saved.k_TGQ, saved.v_TGW,
                                                  ctx.batch.segments, ctx.arena.scratch);
  ctx.ops.attention(ctx.stream, saved.q_THQ, kv.k_UGQ, kv.v_UGW, kv.segments, scale_, saved.o_THW,
                    saved.lse_TH);
  o_proj_.forward_reduced(ctx, saved.o_THW.view({T, H * v_dim_}), out_tD);
}

void MlaAttention::restore(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved) const {
  // Queries that were not compressed are saved rotated; the others are made and rotated again.
  expand(ctx, rope, saved, ctx.arena.scratch, q_b_proj_.has_value());
}

void MlaAttention::backward_input(StepContext& ctx, const RopeTable& rope, const Tensor& dout_tD,
                                  AttentionSaved& saved, const Tensor& dx_tD) const {
  const int64_t T = ctx.batch.num_tokens(), t = ctx.local_tokens(), H = heads_, Q = nope_ + rope_;
  Arena& grads = ctx.arena.grads;
  saved.dout_tD = dout_tD;
  saved.dout_TD = gather_tokens(ctx, dout_tD, grads, "d output of all tokens");
  saved.dq_TX = grads.make(ctx.dtype, {T, H * Q}, "d queries");
  saved.dkvb_TX = grads.make(ctx.dtype, {T, H * (nope_ + v_dim_)}, "d keys and values");
  saved.dkva_tX = grads.make(ctx.dtype, {t, kv_rank_ + rope_}, "d latent and shared key");
  if (q_b_proj_)
    saved.dqa_tM = grads.like(saved.qa_tM, "d compressed queries");
  else
    saved.x_TD = gather_tokens(ctx, saved.x_tD, grads, "all tokens");

  ArenaScope scope(ctx.arena.scratch);
  Arena& scratch = ctx.arena.scratch;
  const DistStream dist = ctx.dist_stream();
  const Tensor do_THW = scratch.make(ctx.dtype, {T, H, v_dim_}, "d attention output");
  o_proj_.backward_input(ctx, saved.dout_TD, do_THW.view({T, H * v_dim_}));

  ctx.dist.kv.gather_start(dist, layer_, saved.k_TGQ, saved.v_TGW);
  const KeysValues kv = ctx.dist.kv.gather_finish(dist, layer_, saved.k_TGQ, saved.v_TGW,
                                                  ctx.batch.segments, scratch);
  const Tensor dk_UGQ = scratch.like(kv.k_UGQ, "d keys"), dv_UGW = scratch.like(kv.v_UGW, "d values");
  ctx.ops.attention_backward(ctx.stream, do_THW, saved.q_THQ, kv.k_UGQ, kv.v_UGW, saved.o_THW,
                             saved.lse_TH, kv.segments, scale_, saved.dq_TX.view({T, H, Q}), dk_UGQ,
                             dv_UGW);
  Tensor dk_THQ, dv_THW;
  ctx.dist.kv.reduce_start(dist, layer_, dk_UGQ, dv_UGW);
  ctx.dist.kv.reduce_finish(dist, layer_, dk_UGQ, dv_UGW, dk_THQ, dv_THW, scratch);
  // Heads of this rank only: what they have for the shared latent is summed over ranks below.
  const Tensor dkva_TX = partial_sums(ctx, saved.dkva_tX, scratch, "partial d latent");
  ctx.ops.mla_qkv_backward(ctx.stream, saved.dq_TX.view({T, H, Q}), dk_THQ, dv_THW, rope,
                           ctx.batch.positions_T, dkva_TX.columns(kv_rank_, kv_rank_ + rope_),
                           saved.dkvb_TX.view({T, H, nope_ + v_dim_}));

  const Tensor dkvn_TL = scratch.make(ctx.dtype, {T, kv_rank_}, "d normed latent");
  kv_b_proj_.backward_input(ctx, saved.dkvb_TX, dkvn_TL);
  kv_a_norm_.backward(ctx, dkvn_TL, saved.kva_TX.columns(0, kv_rank_), saved.kv_rstd_T, {},
                      dkva_TX.columns(0, kv_rank_));
  reduce_tokens(ctx, dkva_TX, saved.dkva_tX);
  kv_a_proj_.backward_input(ctx, saved.dkva_tX, dx_tD);
  queries_backward(ctx, saved, dx_tD);
}

// dx += what comes through the queries.
void MlaAttention::queries_backward(StepContext& ctx, AttentionSaved& saved, const Tensor& dx_tD) const {
  Arena& scratch = ctx.arena.scratch;
  if (q_b_proj_) {
    const Tensor dqan_TM = scratch.like(saved.qa_TM, "d normed compressed queries");
    const Tensor dqa_TM = partial_sums(ctx, saved.dqa_tM, scratch, "partial d compressed queries");
    q_b_proj_->backward_input(ctx, saved.dq_TX, dqan_TM);
    q_a_norm_->backward(ctx, dqan_TM, saved.qa_TM, saved.qa_rstd_T, {}, dqa_TM);
    reduce_tokens(ctx, dqa_TM, saved.dqa_tM);
    q_a_proj_->backward_input(ctx, saved.dqa_tM, dx_tD, Accumulate::add);
    return;
  }
  if (ctx.dist.tensor.size() == 1) {
    q_proj_->backward_input(ctx, saved.dq_TX, dx_tD, Accumulate::add);
    return;
  }
  const Tensor sum_tD = scratch.like(dx_tD, "d input through queries");
  const Tensor partial_TD = partial_sums(ctx, sum_tD, scratch, "partial d input through queries");
  q_proj_->backward_input(ctx, saved.dq_TX, partial_TD);
  reduce_tokens(ctx, partial_TD, sum_tD);
  ctx.ops.add(ctx.stream, dx_tD, sum_tD, dx_tD);
}

void MlaAttention::backward_weight(StepContext& ctx, const AttentionSaved& saved) const {
  const int64_t T = ctx.batch.num_tokens();
  o_proj_.backward_weight(ctx, saved.dout_TD, saved.o_THW.view({T, heads_ * v_dim_}), saved.dout_tD);
  kv_b_proj_.backward_weight(ctx, saved.dkvb_TX, saved.kvn_TL);
  kv_a_proj_.backward_weight(ctx, saved.dkva_tX, saved.x_tD);
  if (!q_b_proj_) {
    q_proj_->backward_weight(ctx, saved.dq_TX, saved.x_TD);
    return;
  }
  q_b_proj_->backward_weight(ctx, saved.dq_TX, saved.qan_TM);
  q_a_proj_->backward_weight(ctx, saved.dqa_tM, saved.x_tD);
}

}  // namespace dstrain
