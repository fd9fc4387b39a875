// Dense gated feed-forward (SwiGLU): out = (silu(x W_gate^T) * (x W_up^T)) W_down^T.
// Gate and up are one parameter [2, I, D], cut over I. Only their product is saved; backward makes h again.
#pragma once

#include "core/layers/declare.h"
#include "core/layers/step_context.h"

namespace dstrain {

struct FeedForwardSaved {
  Tensor x_tD;  // given by the block
  Tensor gate_up_T2I;
  Tensor x_TD, dout_TD, dgate_up_T2I, h_TI;  // for backward_weight
};

class FeedForward {
 public:
  FeedForward(const Declare& declare, int64_t hidden_size, int64_t intermediate_size);

  // While recomputing, out_tD is left alone: backward does not need it.
  void forward(StepContext& ctx, const Tensor& x_tD, FeedForwardSaved& saved, const Tensor& out_tD) const;
  void backward_input(StepContext& ctx, const Tensor& dout_tD, FeedForwardSaved& saved,
                      const Tensor& dx_tD) const;
  // The same in halves, for callers that have other work beside each. begin makes what is saved, up
  // returns SwiGLU's output, which it makes in scratch.
  void begin(StepContext& ctx, const Tensor& x_tD, FeedForwardSaved& saved) const;
  Tensor up(StepContext& ctx, const FeedForwardSaved& saved) const;
  void down(StepContext& ctx, const Tensor& h_TI, const Tensor& out_tD) const;
  void down_backward_input(StepContext& ctx, const Tensor& dout_tD, FeedForwardSaved& saved) const;
  void up_backward_input(StepContext& ctx, const FeedForwardSaved& saved, const Tensor& dx_tD) const;
  void backward_weight(StepContext& ctx, const FeedForwardSaved& saved) const;

 private:
  const Parameter& gate_up_;
  const Parameter& down_;
  int64_t hidden_, inner_;  // inner_ of this rank
};

}  // namespace dstrain
