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

// One round of rows through the experts of this rank: C rows at most.
struct ExpertRound {
  ExpertRows x;
  Tensor dy_XD;              // read through x.row_index
  Tensor gate_up_C2I, h_CI;  // h is made again in backward
  Tensor dgate_up_C2I;
};

struct MoeSaved {
  Tensor x_tD;  // given by the block
  RouterSaved router;
  FeedForwardSaved shared;
  ExpertRound first;  // further rounds are dispatched and computed again in backward
};

class Moe {
 public:
  Moe(const ModelConfig& model, const Declare& declare, int moe_index);

  // While recomputing, out_tD is left alone: backward does not need it.
  void forward(StepContext& ctx, const Tensor& x_tD, MoeSaved& saved, const Tensor& out_tD) const;
  // The input was made again at another address.
  void restore(StepContext& ctx, const Tensor& x_tD, MoeSaved& saved) const;
  void backward_input(StepContext& ctx, const Tensor& dout_tD, MoeSaved& saved,
                      const Tensor& dx_tD) const;
  void backward_weight(StepContext& ctx, const MoeSaved& saved) const;
  const Router& router() const { return router_; }

 private:
  // gate_up = x W^T and h = SwiGLU of it, times the row weight; both made here.
  void up(StepContext& ctx, ExpertRound& round, Arena& saved, Arena& scratch) const;
  // A round's results go back to their tokens. `beside` is work of this rank that needs none of them;
  // it is queued while they travel.
  template <class Work>
  void give_back(StepContext& ctx, const ExpertRound& round, const ExpertResults& results,
                 const Routing& routing, const TokenResults& tokens, const Work& beside) const;
  // Dispatches round i > 0 once more and goes as far as forward did.
  void further_round(StepContext& ctx, int i, const Tensor& x_tD, const Routing& routing,
                     ExpertRound& round) const;
  // From the gradients of a round's outputs to those of its inputs and row weights. dgate_up and h have
  // been made.
  void round_backward(StepContext& ctx, const ExpertRound& round, const ExpertResults& grads) const;
  void round_backward_weight(StepContext& ctx, const ExpertRound& round) const;
  int64_t round_rows(StepContext& ctx) const {
    return ctx.dist.dispatcher.max_rows(ctx.local_tokens(), experts_per_token_);
  }
  Tensor gate_up_matrix(const Tensor& t) const { return t.view({experts_, 2 * inner_, hidden_}); }

  Router router_;
  std::optional<FeedForward> shared_;
  const Parameter& gate_up_;  // [E, 2, I, D]
  const Parameter& down_;     // [E, D, I]
  int64_t hidden_, inner_, experts_;  // experts_ of this rank; each is whole
  int64_t experts_per_token_;
};

}  // namespace dstrain
