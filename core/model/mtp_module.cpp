#include "core/model/mtp_module.h"

#include "core/layers/embedding.h"

namespace dstrain {

MtpModule::MtpModule(const ModelConfig& model, const Declare& declare, int layer, int moe_index,
                     const Parameter& embedding, const Parameter& head)
    : parameter_block_(declare.block),
      embedding_(embedding),
      enorm_(declare.in("enorm"), model.hidden_size, model.rms_norm_eps),
      hnorm_(declare.in("hnorm"), model.hidden_size, model.rms_norm_eps),
      eh_proj_(declare.in("eh_proj"), {model.hidden_size, 2 * model.hidden_size}),
      block_(model, declare, layer, moe_index),
      head_(declare.in("shared_head.norm"), model, head) {}

void MtpModule::forward(StepContext& ctx, const RopeTable& rope, const Tensor& h_tD,
                        const Tensor& tokens_T, const Tensor& targets_T, double factor,
                        MtpSaved& saved) const {
  const int64_t t = h_tD.size(0), D = h_tD.size(1);
  Arena& kept = ctx.arena.kept;
  saved.h_tD = h_tD;
  saved.embedding_tD = kept.like(h_tD, "embedding");
  saved.embedding_rstd_T = kept.make(ctx.stat(), {t}, "embedding rstd");
  saved.h_rstd_T = kept.make(ctx.stat(), {t}, "hidden rstd");
  saved.joined_t2D = kept.make(ctx.dtype, {t, 2 * D}, "normed embedding and hidden");
  embed(ctx, embedding_, tokens_T, saved.embedding_tD);
  enorm_.forward(ctx, saved.embedding_tD, saved.joined_t2D.columns(0, D), saved.embedding_rstd_T);
  hnorm_.forward(ctx, h_tD, saved.joined_t2D.columns(D, 2 * D), saved.h_rstd_T);

  ArenaScope scope(ctx.arena.scratch);
  const Tensor x_tD = eh_proj_.forward(ctx, saved.joined_t2D, ctx.arena.scratch, "joined projection");
  const Tensor delta_tD = ctx.arena.scratch.like(h_tD, "block output");
  const Tensor x_out_tD = ctx.recompute == Recompute::full ? x_tD : Tensor();
  const Tensor sum_tD = block_.forward(ctx, rope, x_tD, {}, saved.block, x_out_tD, delta_tD);
  head_.forward(ctx, sum_tD, delta_tD, {targets_T, {}, {}}, factor, ctx.sums.mtp_1, saved.head);
}

void MtpModule::backward(StepContext& ctx, const RopeTable& rope, const Tensor& dout_tD,
                         const Tensor& tokens_T, MtpSaved& saved, const Tensor& dh_tD) const {
  const int64_t D = dh_tD.size(1);
  ArenaScope scope(ctx.arena.scratch);
  Arena& scratch = ctx.arena.scratch;
  const Tensor dsum_tD = scratch.like(dh_tD, "d block output");
  const Tensor dx_tD = scratch.like(dh_tD, "d joined projection");
  head_.backward(ctx, saved.head, dsum_tD);
  if (dout_tD.defined()) ctx.ops.add(ctx.stream, dsum_tD, dout_tD, dsum_tD);
  block_.backward_input(ctx, rope, dsum_tD, saved.block, dx_tD);
  block_.backward_weight(ctx, saved.block);
  eh_proj_.backward_weight(ctx, dx_tD, saved.joined_t2D);

  const Tensor djoined_t2D = scratch.like(saved.joined_t2D, "d joined");
  eh_proj_.backward_input(ctx, dx_tD, djoined_t2D);
  hnorm_.backward(ctx, djoined_t2D.columns(D, 2 * D), saved.h_tD, saved.h_rstd_T, {}, dh_tD);
  enorm_.backward(ctx, djoined_t2D.columns(0, D), saved.embedding_tD, saved.embedding_rstd_T, {},
                  dx_tD);
  embed_backward(ctx, embedding_, tokens_T, dx_tD);
}

}  // namespace dstrain
