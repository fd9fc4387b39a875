// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1):
//   [c | k_rope] = x W_kv_a;   [k_nope | v] per head = norm(c) W_kv_b;
//   q per head = norm(x W_q_a) W_q_b, or x W_q without query compression;
//   the last P of each q and the shared k_rope are rotated; out = attention(q, [k_nope | k_rope], v) W_o.
#pragma once

#include <optional>

#include "core/layers/attention.h"

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
  void queries_backward(StepContext& ctx, AttentionSaved& saved, const Tensor& dx_tD) const;

  int layer_;
  int64_t nope_, rope_, v_dim_, kv_rank_;
  double scale_;
  std::optional<Linear> q_proj_, q_a_proj_, q_b_proj_;
  std::optional<RmsNorm> q_a_norm_;
  Linear kv_a_proj_;
  RmsNorm kv_a_norm_;
  Linear kv_b_proj_;
  Linear o_proj_;
  int64_t heads_;  // of this rank
};

}  // namespace dstrain
