// Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245); with as many key/value heads as
// query heads, plain multi-head attention. One product makes queries, keys and values: the weight
// is [G, H/G + 2, Q, D], so that a cut over key/value heads keeps each group whole.
#pragma once

#include "core/layers/peer_attention.h"

namespace dstrain {

class GqaAttention : public Attention {
 public:
  GqaAttention(const ModelConfig& model, const Declare& declare, int layer);
  void forward(StepContext& ctx, const RopeTable& rope, const Tensor& x_tD, AttentionSaved& saved,
               const Tensor& out_tD) const override;
  void restore(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved) const override;
  void backward_input(StepContext& ctx, const RopeTable& rope, const Tensor& dout_tD,
                      AttentionSaved& saved, const Tensor& dx_tD) const override;
  void backward_weight(StepContext& ctx, const AttentionSaved& saved) const override;

 private:
  void project(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved, Arena& arena) const;

  AttentionCall call_;
  int64_t head_dim_, queries_per_group_;
  Linear qkv_proj_;
  Linear o_proj_;
  int64_t groups_;  // key/value heads of this rank
};

}  // namespace dstrain
