#include "core/model/transformer_block.h"

namespace dstrain {

TransformerBlock::TransformerBlock(const ModelConfig& model, const Declare& declare, int layer,
                                   int moe_index)
    : norm1_(declare.in("input_layernorm"), model.hidden_size, model.rms_norm_eps),
      attention_(make_attention(model, declare.in("self_attn"), layer)),
      norm2_(declare.in("post_attention_layernorm"), model.hidden_size, model.rms_norm_eps) {
  if (moe_index >= 0)
    moe_.emplace(model, declare.in("mlp"), moe_index);
  else
    dense_.emplace(declare.in("mlp"), model.hidden_size, model.intermediate_size);
}

Tensor TransformerBlock::forward(StepContext& ctx, const RopeTable& rope, const Tensor& x_TD,
                                 const Tensor& delta_TD, BlockSaved& saved, const Tensor& x_out_TD,
                                 const Tensor& delta_out_TD) const {
  const int64_t T = x_TD.size(0);
  const Arenas& arena = ctx.arena;
  saved.sum1_TD = arena.kept.like(x_TD, "block input");
  saved.sum2_TD = x_out_TD.defined() ? x_out_TD : arena.kept.like(x_TD, "residual sum");
  ArenaScope scope(arena.scratch);
  saved.rstd1_T = arena.saved.make(ctx.stat(), {T}, "rstd");
  saved.y1_TD = arena.cheap.like(x_TD, "normed block input");
  norm1_.forward_add(ctx, x_TD, delta_TD, saved.sum1_TD, saved.y1_TD, saved.rstd1_T);
  sublayers(ctx, rope, saved, delta_out_TD);
  return saved.sum2_TD;
}

void TransformerBlock::sublayers(StepContext& ctx, const RopeTable& rope, BlockSaved& saved,
                                 const Tensor& delta_out_TD) const {
  const Arenas& arena = ctx.arena;
  const Tensor attention_TD = arena.scratch.like(saved.sum1_TD, "attention sublayer");
  attention_->forward(ctx, rope, saved.y1_TD, saved.attention, attention_TD);
  saved.rstd2_T = arena.saved.make(ctx.stat(), {saved.sum1_TD.size(0)}, "rstd");
  saved.y2_TD = arena.cheap.like(saved.sum1_TD, "normed residual");
  norm2_.forward_add(ctx, saved.sum1_TD, attention_TD, saved.sum2_TD, saved.y2_TD, saved.rstd2_T);
  if (moe_)
    moe_->forward(ctx, saved.y2_TD, saved.moe, delta_out_TD);
  else
    dense_->forward(ctx, saved.y2_TD, saved.dense, delta_out_TD);
}

// Everything from the block's input, except the routing, which was kept.
void TransformerBlock::recompute(StepContext& ctx, const RopeTable& rope, BlockSaved& saved) const {
  Arena& scratch = ctx.arena.scratch;
  saved.rstd1_T = scratch.make(ctx.stat(), {saved.sum1_TD.size(0)}, "rstd");
  saved.y1_TD = scratch.like(saved.sum1_TD, "normed block input");
  saved.sum2_TD = scratch.like(saved.sum1_TD, "residual sum");
  norm1_.forward(ctx, saved.sum1_TD, saved.y1_TD, saved.rstd1_T);
  ctx.recomputing = true;
  sublayers(ctx, rope, saved, {});
  ctx.recomputing = false;
}

// Norm outputs, expanded queries, keys and values; the rest was saved.
void TransformerBlock::restore(StepContext& ctx, const RopeTable& rope, BlockSaved& saved) const {
  Arena& scratch = ctx.arena.scratch;
  saved.y1_TD = scratch.like(saved.sum1_TD, "normed block input");
  norm1_.forward(ctx, saved.sum1_TD, saved.y1_TD, saved.rstd1_T);
  saved.attention.x_tD = saved.y1_TD;
  attention_->restore(ctx, rope, saved.attention);
  saved.y2_TD = scratch.like(saved.sum2_TD, "normed residual");
  norm2_.forward(ctx, saved.sum2_TD, saved.y2_TD, saved.rstd2_T);
  if (moe_)
    moe_->restore(ctx, saved.y2_TD, saved.moe);
  else
    saved.dense.x_tD = saved.y2_TD;
}

void TransformerBlock::backward_input(StepContext& ctx, const RopeTable& rope, const Tensor& dout_TD,
                                      BlockSaved& saved, const Tensor& din_TD) const {
  if (ctx.recompute == Recompute::full) recompute(ctx, rope, saved);
  if (ctx.recompute == Recompute::selective) restore(ctx, rope, saved);
  const Tensor dsum2_TD = ctx.arena.grads.like(dout_TD, "d residual sum");
  const Tensor dy_TD = ctx.arena.scratch.like(dout_TD, "d norm output");
  if (moe_)
    moe_->backward_input(ctx, dout_TD, saved.moe, dy_TD);
  else
    dense_->backward_input(ctx, dout_TD, saved.dense, dy_TD);
  norm2_.backward(ctx, dy_TD, saved.sum2_TD, saved.rstd2_T, dout_TD, dsum2_TD);
  attention_->backward_input(ctx, rope, dsum2_TD, saved.attention, dy_TD);
  norm1_.backward(ctx, dy_TD, saved.sum1_TD, saved.rstd1_T, dsum2_TD, din_TD);
}

void TransformerBlock::backward_weight(StepContext& ctx, const BlockSaved& saved) const {
  attention_->backward_weight(ctx, saved.attention);
  if (moe_)
    moe_->backward_weight(ctx, saved.moe);
  else
    dense_->backward_weight(ctx, saved.dense);
}

}  // namespace dstrain
