#include "core/model/mtp_module.h"

namespace dstrain {

MtpModule::MtpModule(const ModelConfig& model, const Declare& declare, int layer, int moe_index,
                     const Parameter& embedding, const Parameter& head)
    : embedding_(embedding),
      enorm_(declare.in("enorm"), model.hidden_size, model.rms_norm_eps),
      hnorm_(declare.in("hnorm"), model.hidden_size, model.rms_norm_eps),
      eh_proj_(declare.in("eh_proj"), {model.hidden_size, 2 * model.hidden_size}),
      block_(model, declare, layer, moe_index),
      head_(declare.in("shared_head.norm"), model, head) {}

void MtpModule::forward(StepContext& ctx, const RopeTable& rope, const Tensor& h_TD,
                        const Tensor& tokens_T, const Tensor& targets_T, double factor,
                        MtpSaved& saved) const {
  const int64_t T = h_TD.size(0), D = h_TD.size(1);
  Arena& kept = ctx.arena.kept;
  saved.h_TD = h_TD;
  saved.embedding_TD = kept.like(h_TD, "embedding");
  saved.embedding_rstd_T = kept.make(ctx.stat(), {T}, "embedding rstd");
  saved.h_rstd_T = kept.make(ctx.stat(), {T}, "hidden rstd");
  saved.joined_T2D = kept.make(ctx.dtype, {T, 2 * D}, "normed embedding and hidden");
  ctx.ops.embedding(ctx.stream, tokens_T, embedding_.value, 0, saved.embedding_TD);
  enorm_.forward(ctx, saved.embedding_TD, saved.joined_T2D.columns(0, D), saved.embedding_rstd_T);
  hnorm_.forward(ctx, h_TD, saved.joined_T2D.columns(D, 2 * D), saved.h_rstd_T);

  ArenaScope scope(ctx.arena.scratch);
  const Tensor x_TD = eh_proj_.forward(ctx, saved.joined_T2D, ctx.arena.scratch, "joined projection");
  const Tensor delta_TD = ctx.arena.scratch.like(h_TD, "block output");
  const Tensor x_out_TD = ctx.recompute == Recompute::full ? x_TD : Tensor();
  const Tensor sum_TD = block_.forward(ctx, rope, x_TD, {}, saved.block, x_out_TD, delta_TD);
  head_.forward(ctx, sum_TD, delta_TD, {targets_T, {}, {}}, factor, ctx.sums.mtp_1, saved.head);
}

void MtpModule::backward(StepContext& ctx, const RopeTable& rope, const Tensor& dout_TD,
                         const Tensor& tokens_T, MtpSaved& saved, const Tensor& dh_TD) const {
  const int64_t D = dh_TD.size(1);
  ArenaScope scope(ctx.arena.scratch);
  Arena& scratch = ctx.arena.scratch;
  const Tensor dsum_TD = scratch.like(dh_TD, "d block output");
  const Tensor dx_TD = scratch.like(dh_TD, "d joined projection");
  head_.backward(ctx, saved.head, dsum_TD);
  if (dout_TD.defined()) ctx.ops.add(ctx.stream, dsum_TD, dout_TD, dsum_TD);
  block_.backward_input(ctx, rope, dsum_TD, saved.block, dx_TD);
  block_.backward_weight(ctx, saved.block);
  eh_proj_.backward_weight(ctx, dx_TD, saved.joined_T2D);

  const Tensor djoined_T2D = scratch.like(saved.joined_T2D, "d joined");
  eh_proj_.backward_input(ctx, dx_TD, djoined_T2D);
  hnorm_.backward(ctx, djoined_T2D.columns(D, 2 * D), saved.h_TD, saved.h_rstd_T, {}, dh_TD);
  enorm_.backward(ctx, djoined_T2D.columns(0, D), saved.embedding_TD, saved.embedding_rstd_T, {},
                  dx_TD);
  const GradTarget target = ctx.dist.params.grad(embedding_);
  ctx.ops.embedding_backward(ctx.stream, tokens_T, dx_TD, 0, target.accumulate, target.grad);
}

}  // namespace dstrain
