// Mixture of experts (DeepSeekMoE, arXiv:2401.06066): shared experts see every token, routed experts the
// tokens that chose them; dropless.
//   out = shared(x) + sum_k weight_k * expert_{index_k}(x)
// The routing weight multiplies the expert's inner activation, so that its gradient needs no saved
// expert output:  weight * (h W_down^T) = (weight * h) W_down^T.
#pragma once

#include <optional>

#include "core/layers/feed_forward.h"
#include "core/layers/router.h"

namespace dstrain {

struct MoeSaved {
  Tensor x_TD;  // given by the block
  RouterSaved router;
  FeedForwardSaved shared;
  Tensor gate_up_R2I;
  // For backward_weight.
  ExpertRows x_rows, dy_rows;
  Tensor dgate_up_R2I, h_RI;
};

class Moe {
 public:
  Moe(const ModelConfig& model, const Declare& declare, int moe_index);

  // While recomputing, out_TD is left alone: backward does not need it.
  void forward(StepContext& ctx, const Tensor& x_TD, MoeSaved& saved, const Tensor& out_TD) const;
  // The input was made again at another address.
  void restore(const Tensor& x_TD, MoeSaved& saved) const;
  void backward_input(StepContext& ctx, const Tensor& dout_TD, MoeSaved& saved,
                      const Tensor& dx_TD) const;
  void backward_weight(StepContext& ctx, const MoeSaved& saved) const;
  const Router& router() const { return router_; }

 private:
  Tensor gate_up_matrix(const Tensor& t) const { return t.view({experts_, 2 * inner_, hidden_}); }

  Router router_;
  std::optional<FeedForward> shared_;
  const Parameter& gate_up_;  // [E, 2, I, D]
  const Parameter& down_;     // [E, D, I]
  int64_t hidden_, inner_, experts_;  // experts_ and inner_ of this rank
  int64_t experts_per_token_;
};

}  // namespace dstrain
