#include "core/layers/mla_attention.h"

#include "core/layers/rope.h"
#include "core/layers/sequence_parallel.h"

namespace dstrain {

MlaAttention::MlaAttention(const ModelConfig& model, const Declare& declare, int layer)
    : call_{layer, attention_scale(model)},
      nope_(model.qk_nope_head_dim),
      rope_(model.qk_rope_head_dim),
      v_dim_(model.v_head_dim),
      kv_rank_(model.kv_lora_rank),
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
    q_proj_.emplace(declare.in("q_proj"), std::vector<int64_t>{H, Q, D},
                    ShardSpec{.tensor_dim = 0});
    return;
  }
  q_a_proj_.emplace(declare.in("q_a_proj"), std::vector<int64_t>{model.q_lora_rank, D}, ShardSpec{},
                    model.attention_bias ? Bias::add : Bias::none);
  q_a_norm_.emplace(declare.in("q_a_layernorm"), model.q_lora_rank, model.rms_norm_eps);
  q_b_proj_.emplace(declare.in("q_b_proj"), std::vector<int64_t>{H, Q, model.q_lora_rank},
                    ShardSpec{.tensor_dim = 0});
}

void MlaAttention::expand(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved,
                          Arena& arena, bool rotate_q) const {
  const int64_t T = ctx.batch.num_tokens();
  saved.kva_TX = gather_tokens(ctx, saved.kva_tX, arena, "latent and shared key of all tokens");
  if (q_b_proj_) {
    saved.qa_TM = gather_tokens(ctx, saved.qa_tM, arena, "compressed queries of all tokens");
    saved.qan_TM = arena.like(saved.qa_TM, "normed compressed queries");
    saved.qa_rstd_T = arena.make(ctx.stat(), {T}, "query rstd");
    q_a_norm_->forward(ctx, saved.qa_TM, saved.qan_TM, saved.qa_rstd_T);
    saved.q_THQ =
        q_b_proj_->forward(ctx, saved.qan_TM, arena, "queries").view({T, heads_, nope_ + rope_});
  }
  const Keys keys = keys_of(ctx, rope, saved.kva_TX, ctx.batch.positions_T,
                            rotate_q ? saved.q_THQ : Tensor(), arena);
  saved.kvn_TL = keys.kvn_TL;
  saved.kv_rstd_T = keys.rstd_T;
  saved.k_TGQ = keys.k_THQ;
  saved.v_TGW = keys.v_THW;
}

// Of the rows of any rank. Rotates q_THQ, which may be absent.
MlaAttention::Keys MlaAttention::keys_of(StepContext& ctx, const RopeTable& rope,
                                         const Tensor& kva_TX, const Tensor& positions_T,
                                         const Tensor& q_THQ, Arena& arena) const {
  const int64_t T = kva_TX.size(0), H = heads_;
  Keys keys;
  keys.kvn_TL = arena.make(ctx.dtype, {T, kv_rank_}, "normed latent");
  keys.rstd_T = arena.make(ctx.stat(), {T}, "latent rstd");
  kv_a_norm_.forward(ctx, latent(kva_TX), keys.kvn_TL, keys.rstd_T);
  keys.k_THQ = arena.make(ctx.dtype, {T, H, nope_ + rope_}, "keys");
  keys.v_THW = arena.make(ctx.dtype, {T, H, v_dim_}, "values");

  ArenaScope scope(ctx.arena.scratch);
  // Scratch may be `arena` itself: keys and values were made before the scope was opened.
  const Tensor kv_b_TX = kv_b_proj_.forward(ctx, keys.kvn_TL, ctx.arena.scratch, "keys and values");
  ctx.ops.mla_qkv(ctx.stream, q_THQ, shared_key(kva_TX), kv_b_TX.view({T, H, nope_ + v_dim_}), rope,
                  positions_T, keys.k_THQ, keys.v_THW);
  return keys;
}

// dkva_TX and dkvb_TX, which backward_weight of kv_b_proj_ reads, from dk and dv. Rotates dq_THQ
// back, which may be absent.
void MlaAttention::keys_backward(StepContext& ctx, const RopeTable& rope, const KeyGradients& d,
                                 const Keys& keys, const Tensor& kva_TX, const Tensor& positions_T,
                                 const Tensor& dkvb_TX, const Tensor& dkva_TX) const {
  const int64_t T = kva_TX.size(0);
  ArenaScope scope(ctx.arena.scratch);
  ctx.ops.mla_qkv_backward(ctx.stream, d.dq_THQ, d.dk_THQ, d.dv_THW, rope, positions_T,
                           shared_key(dkva_TX), dkvb_TX.view({T, heads_, nope_ + v_dim_}));
  const Tensor dkvn_TL = ctx.arena.scratch.make(ctx.dtype, {T, kv_rank_}, "d normed latent");
  kv_b_proj_.backward_input(ctx, dkvb_TX, dkvn_TL);
  kv_a_norm_.backward(ctx, dkvn_TL, latent(kva_TX), keys.rstd_T, {}, latent(dkva_TX));
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

  attention_with_peers(ctx, call_, {saved.kva_TX}, saved,
                       [&](const KeyRows& rows, const PeerTokens& tokens, const auto& attention) {
                         const Keys keys =
                             keys_of(ctx, rope, rows[0], tokens.positions_T, {}, ctx.arena.scratch);
                         attention(keys.k_THQ, keys.v_THW);
                       });
  o_proj_.forward_reduced(ctx, saved.o_THW.view({T, H * v_dim_}), out_tD);
}

void MlaAttention::restore(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved) const {
  // Queries that were not compressed are saved rotated; the others are made and rotated again.
  expand(ctx, rope, saved, ctx.arena.scratch, q_b_proj_.has_value());
}

// What a peer's keys cost in weights' gradients is added at once: it would take as much memory as
// they do to add it in backward_weight.
template <class Attend>
void MlaAttention::peer_backward(StepContext& ctx, const RopeTable& rope,
                                 const KvExchange::Peer& peer, const PeerTokens& tokens,
                                 const Attend& attention) const {
  Arena& scratch = ctx.arena.scratch;
  const Tensor& kva_TX = peer.rows[0];
  const Keys keys = keys_of(ctx, rope, kva_TX, tokens.positions_T, {}, scratch);
  const Tensor dk_THQ = scratch.like(keys.k_THQ, "d keys"),
               dv_THW = scratch.like(keys.v_THW, "d values");
  attention(keys.k_THQ, keys.v_THW, dk_THQ, dv_THW);
  const Tensor dkvb_TX =
      scratch.make(ctx.dtype, {kva_TX.size(0), heads_ * (nope_ + v_dim_)}, "d keys and values");
  keys_backward(ctx, rope, {{}, dk_THQ, dv_THW}, keys, kva_TX, tokens.positions_T, dkvb_TX,
                peer.gradients[0]);
  kv_b_proj_.backward_weight(ctx, dkvb_TX, keys.kvn_TL);
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
  KvExchange& kv = ctx.dist.kv;
  kv.pass_start(ctx.dist_stream(), {saved.kva_TX}, ctx.batch.sequences,
                KvExchange::Returns::gradients, scratch);
  const Tensor do_THW = scratch.make(ctx.dtype, {T, H, v_dim_}, "d attention output");
  o_proj_.backward_input(ctx, saved.dout_TD, do_THW.view({T, H * v_dim_}));

  const Tensor dq_THQ = saved.dq_TX.view({T, H, Q});
  const Tensor dq_by_peers_THQ = attention_backward_of_peers(
      ctx, call_, saved, do_THW, dq_THQ,
      [&](const KvExchange::Peer& peer, const PeerTokens& tokens, const auto& attention) {
        peer_backward(ctx, rope, peer, tokens, attention);
      });
  const Tensor dk_THQ = scratch.like(saved.k_TGQ, "d keys"),
               dv_THW = scratch.like(saved.v_TGW, "d values");
  attention_backward_of_own(ctx, call_, saved, do_THW, dq_by_peers_THQ, dq_THQ, dk_THQ, dv_THW);
  // Heads of this rank only: what they have for the shared latent is summed over ranks below.
  const Tensor dkva_TX = partial_sums(ctx, saved.dkva_tX, scratch, "partial d latent");
  keys_backward(ctx, rope, {dq_THQ, dk_THQ, dv_THW}, {saved.kvn_TL, saved.kv_rstd_T}, saved.kva_TX,
                ctx.batch.positions_T, saved.dkvb_TX, dkva_TX);
  kv.pass_finish(ctx.dist_stream(), {dkva_TX});
  reduce_tokens(ctx, dkva_TX, saved.dkva_tX);
  kv_a_proj_.backward_input(ctx, saved.dkva_tX, dx_tD);
  queries_backward(ctx, saved, dx_tD);
}

// dx += what comes through the queries.
void MlaAttention::queries_backward(StepContext& ctx, AttentionSaved& saved,
                                    const Tensor& dx_tD) const {
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
  o_proj_.backward_weight(ctx, saved.dout_TD, saved.o_THW.view({T, heads_ * v_dim_}),
                          saved.dout_tD);
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
