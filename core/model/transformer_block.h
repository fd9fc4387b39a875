// One pre-norm block:  sum1 = x + delta,  sum2 = sum1 + attention(norm(sum1)),  out = ffn(norm(sum2)).
// The residual stream travels as (x, delta): the addition is part of the next norm. The block's output
// is (sum2, out). Rows are this rank's tokens.
#pragma once

#include <memory>
#include <optional>

#include "core/layers/attention.h"
#include "core/layers/moe.h"

namespace dstrain {

struct BlockSaved {
  Tensor sum1_TD, rstd1_T, y1_TD;
  AttentionSaved attention;
  Tensor sum2_TD, rstd2_T, y2_TD;
  FeedForwardSaved dense;
  MoeSaved moe;
};

class TransformerBlock {
 public:
  // moe_index < 0 makes a dense block; `layer` keys the key/value exchange.
  TransformerBlock(const ModelConfig& model, const Declare& declare, int layer, int moe_index);

  // x and delta (may be absent) are read before x_out and delta_out are written; delta_out may be delta,
  // and x_out, where given, may be x. Where x_out is absent, sum2 is saved and returned.
  Tensor forward(StepContext& ctx, const RopeTable& rope, const Tensor& x_TD, const Tensor& delta_TD,
                 BlockSaved& saved, const Tensor& x_out_TD, const Tensor& delta_out_TD) const;
  // dout is the gradient of the output sum, din that of the input sum. What it makes in ctx.arena.grads
  // and scratch must live until backward_weight.
  void backward_input(StepContext& ctx, const RopeTable& rope, const Tensor& dout_TD, BlockSaved& saved,
                      const Tensor& din_TD) const;
  void backward_weight(StepContext& ctx, const BlockSaved& saved) const;

  const Router* router() const { return moe_ ? &moe_->router() : nullptr; }

 private:
  void sublayers(StepContext& ctx, const RopeTable& rope, BlockSaved& saved,
                 const Tensor& delta_out_TD) const;
  void recompute(StepContext& ctx, const RopeTable& rope, BlockSaved& saved) const;
  void restore(StepContext& ctx, const RopeTable& rope, BlockSaved& saved) const;

  RmsNorm norm1_;
  std::unique_ptr<Attention> attention_;
  RmsNorm norm2_;
  std::optional<FeedForward> dense_;
  std::optional<Moe> moe_;
};

}  // namespace dstrain
