// Output head and cross entropy, by chunks of rows so that the logits of a micro-batch never exist at
// once:  logits = norm(x) W^T,  loss = sum over tokens of -log softmax(logits)[target].
// Because the loss is last, its gradient with respect to x and W is made in the forward pass.
#pragma once

#include "core/config/config.h"
#include "core/layers/rms_norm.h"

namespace dstrain {

struct LossHeadSaved {
  Tensor x_tD;    // sum of the residual stream; given by the model
  Tensor rstd_T;
  Tensor dy_tD;   // gradient of the normed rows, made in forward
};

class LossHead {
 public:
  // weight is the head or the tied embedding, [V, D], cut over the vocabulary.
  LossHead(const Declare& norm, const ModelConfig& model, const Parameter& weight);

  // sum = x + delta; adds the sum of token losses to loss_1 (f64), the same on each tensor-parallel rank.
  // When training, also adds the head's gradient, times `factor`, and keeps dy. Targets are those of all
  // T tokens; ctx.token_loss_T, where defined, gets each one's loss.
  void forward(StepContext& ctx, const Tensor& x_tD, const Tensor& delta_tD,
               const CrossEntropyTargets& targets, double factor, const Tensor& loss_1,
               LossHeadSaved& saved) const;
  // dx_tD = gradient with respect to the sum.
  void backward(StepContext& ctx, const LossHeadSaved& saved, const Tensor& dx_tD) const;
  // Only the sum and its norm, for logits() without a loss.
  void forward_norm(StepContext& ctx, const Tensor& x_tD, const Tensor& delta_tD,
                    LossHeadSaved& saved) const;
  // logits_CV = norm(x) W^T for rows of saved.x_tD; the whole vocabulary on this rank.
  void logits(StepContext& ctx, const Tensor& x_CD, const Tensor& logits_CV) const;

 private:
  void chunk(StepContext& ctx, const Tensor& y_CD, const CrossEntropyTargets& targets, double factor,
             const Tensor& loss_1, const Tensor& dy_CD, const Tensor& token_loss_C) const;

  RmsNorm norm_;
  int norm_block_;
  const Parameter& weight_;
  int64_t vocab_begin_;  // of this rank's slice
};

}  // namespace dstrain
