// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1):
//   [c | k_rope] = x W_kv_a;   [k_nope | v] per head = norm(c) W_kv_b;
//   q per head = norm(x W_q_a) W_q_b, or x W_q without query compression;
//   the last P of each q and the shared k_rope are rotated; out = attention(q, [k_nope | k_rope],
//   v) W_o.
#pragma once

#include <optional>

#include "core/layers/peer_attention.h"

namespace dstrain {

class MlaAttention : public Attention {
 public:
  MlaAttention(const ModelConfig& model, const Declare& declare, int layer);
  void forward(StepContext& ctx, const RopeTable& rope, const Tensor& x_tD, AttentionSaved& saved,
               const Tensor& out_tD) const override;
  void restore(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved) const override;
  void backward_input(StepContext& ctx, const RopeTable& rope, const Tensor& dout_tD,
                      AttentionSaved& saved, const Tensor& dx_tD) const override;
  void backward_weight(StepContext& ctx, const AttentionSaved& saved) const override;

 private:
  // Queries from their compressed form, keys and values from theirs.
  void expand(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved, Arena& arena,
              bool rotate_q) const;
  struct Keys {
    Tensor kvn_TL, rstd_T, k_THQ = {}, v_THW = {};
  };
  Keys keys_of(StepContext& ctx, const RopeTable& rope, const Tensor& kva_TX,
               const Tensor& positions_T, const Tensor& q_THQ, Arena& arena) const;
  struct KeyGradients {
    Tensor dq_THQ, dk_THQ, dv_THW;
  };
  void keys_backward(StepContext& ctx, const RopeTable& rope, const KeyGradients& d,
                     const Keys& keys, const Tensor& kva_TX, const Tensor& positions_T,
                     const Tensor& dkvb_TX, const Tensor& dkva_TX) const;
  template <class Attend>
  void peer_backward(StepContext& ctx, const RopeTable& rope, const KvExchange::Peer& peer,
                     const PeerTokens& tokens, const Attend& attention) const;
  void queries_backward(StepContext& ctx, AttentionSaved& saved, const Tensor& dx_tD) const;

  // The parts of a row of kva_TX.
  Tensor latent(const Tensor& kva_TX) const { return kva_TX.columns(0, kv_rank_); }
  Tensor shared_key(const Tensor& kva_TX) const {
    return kva_TX.columns(kv_rank_, kv_rank_ + rope_);
  }

  AttentionCall call_;
  int64_t nope_, rope_, v_dim_, kv_rank_;
  std::optional<Linear> q_proj_, q_a_proj_, q_b_proj_;
  std::optional<RmsNorm> q_a_norm_;
  Linear kv_a_proj_;
  RmsNorm kv_a_norm_;
  Linear kv_b_proj_;
  Linear o_proj_;
  int64_t heads_;  // of this rank
};

}  // namespace dstrain
