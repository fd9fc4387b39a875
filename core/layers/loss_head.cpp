#include "core/layers/loss_head.h"

#include <algorithm>

#include "core/layers/sequence_parallel.h"

namespace dstrain {
namespace {

// Chunks of nearly equal size; at least 64 rows keep the products efficient.
int64_t chunk_rows(int64_t tokens, int64_t bytes, int64_t vocab, DType logits) {
  const int64_t most = std::max<int64_t>(64, bytes / (vocab * dtype_bytes(logits)) / 64 * 64);
  const int64_t chunks = std::max<int64_t>(1, (tokens + most - 1) / most);
  return std::max<int64_t>(64, ((tokens + chunks - 1) / chunks + 63) / 64 * 64);
}

Tensor rows_of(const Tensor& x, int64_t begin, int64_t end) {
  return x.defined() ? x.rows(begin, end) : Tensor();
}

}  // namespace

LossHead::LossHead(const Declare& norm, const ModelConfig& model, const Parameter& weight)
    : norm_(norm, model.hidden_size, model.rms_norm_eps),
      norm_block_(norm.block),
      weight_(weight),
      vocab_begin_(weight.local_begin[0]) {}

void LossHead::forward_norm(StepContext& ctx, const Tensor& x_tD, const Tensor& delta_tD,
                            LossHeadSaved& saved) const {
  const AcquiredBlock values(ctx.dist.params, ctx.dist_stream(), norm_block_);
  saved.x_tD = ctx.arena.kept.like(x_tD, "last residual sum");
  saved.rstd_T = ctx.arena.kept.make(ctx.stat(), {x_tD.size(0)}, "last rstd");
  // Holds the norm's output; its gradient takes that place chunk by chunk.
  saved.dy_tD = ctx.arena.kept.like(x_tD, "last norm");
  norm_.forward_add(ctx, x_tD, delta_tD, saved.x_tD, saved.dy_tD, saved.rstd_T);
}

void LossHead::forward(StepContext& ctx, const Tensor& x_tD, const Tensor& delta_tD,
                       const CrossEntropyTargets& targets, double factor, const Tensor& loss_1,
                       LossHeadSaved& saved) const {
  const int64_t T = ctx.batch.num_tokens(), ranks = ctx.dist.tensor.size();
  forward_norm(ctx, x_tD, delta_tD, saved);
  const AcquiredBlock values(ctx.dist.params, ctx.dist_stream(), weight_.spec.block);
  ArenaScope scope(ctx.arena.scratch);
  const Tensor y_TD = gather_tokens(ctx, saved.dy_tD, ctx.arena.scratch, "last norm of all tokens");
  // Of the largest slice, so that all ranks cut alike.
  const int64_t C = chunk_rows(T, ctx.logits_bytes, (weight_.spec.shape[0] + ranks - 1) / ranks, ctx.stat());
  for (int64_t begin = 0; begin < T; begin += C) {
    const int64_t end = std::min(T, begin + C);
    const CrossEntropyTargets part = {rows_of(targets.hard_T, begin, end),
                                      rows_of(targets.soft_index_TK, begin, end),
                                      rows_of(targets.soft_prob_TK, begin, end)};
    const Tensor y_CD = y_TD.rows(begin, end);
    chunk(ctx, y_CD, part, factor, loss_1, y_CD, rows_of(ctx.token_loss_T, begin, end));
  }
  if (ctx.training) reduce_tokens(ctx, y_TD, saved.dy_tD);
}

void LossHead::chunk(StepContext& ctx, const Tensor& y_CD, const CrossEntropyTargets& targets,
                     double factor, const Tensor& loss_1, const Tensor& dy_CD,
                     const Tensor& token_loss_C) const {
  const int64_t C = y_CD.size(0), V = weight_.local_shape[0];
  const DistStream dist = ctx.dist_stream();
  ArenaScope scope(ctx.arena.scratch);
  Arena& scratch = ctx.arena.scratch;
  const Tensor logits_CV = scratch.make(ctx.dtype, {C, V}, "logits");
  const Tensor max_C = scratch.make(ctx.stat(), {C}, "row maximum");
  const Tensor sums_2C = scratch.make(ctx.stat(), {2, C}, "row sums");
  const Tensor sum_exp_C = sums_2C.rows(0, 1).view({C}), target_C = sums_2C.rows(1, 2).view({C});
  const Tensor lse_C = scratch.make(ctx.stat(), {C}, "log-sum-exp");

  ctx.ops.matmul(ctx.stream, Trans::no, Trans::yes, 1.0, y_CD, weight_.value, 0.0, logits_CV);
  ctx.ops.cross_entropy_stats(ctx.stream, logits_CV, targets, vocab_begin_, max_C, sum_exp_C, target_C);
  if (ctx.dist.tensor.size() > 1) {
    const Tensor local_max_C = scratch.like(max_C, "local maximum");
    ctx.ops.convert(ctx.stream, max_C, local_max_C);
    ctx.dist.tensor.all_reduce_max(dist, max_C);
    ctx.ops.rescale_sum_exp(ctx.stream, local_max_C, max_C, sum_exp_C);
    ctx.dist.tensor.all_reduce_sum(dist, sums_2C);
  }
  ctx.ops.cross_entropy_loss(ctx.stream, targets, max_C, sum_exp_C, target_C, lse_C, loss_1,
                             token_loss_C);
  if (!ctx.training) return;
  ctx.ops.cross_entropy_backward(ctx.stream, logits_CV, targets, vocab_begin_, lse_C, ctx.scalars,
                                 factor);
  const GradTarget target = ctx.dist.params.grad(weight_);
  ctx.ops.matmul(ctx.stream, Trans::yes, Trans::no, 1.0, logits_CV, y_CD,
                 target.accumulate == Accumulate::add ? 1.0 : 0.0, target.grad);
  ctx.ops.matmul(ctx.stream, Trans::no, Trans::no, 1.0, logits_CV, weight_.value, 0.0, dy_CD);
}

void LossHead::backward(StepContext& ctx, const LossHeadSaved& saved, const Tensor& dx_tD) const {
  const AcquiredBlock values(ctx.dist.params, ctx.dist_stream(), norm_block_);
  norm_.backward(ctx, saved.dy_tD, saved.x_tD, saved.rstd_T, {}, dx_tD);
}

void LossHead::logits(StepContext& ctx, const Tensor& x_CD, const Tensor& logits_CV) const {
  DSTRAIN_CHECK(weight_.local_shape[0] == weight_.spec.shape[0], "logits need the whole vocabulary");
  const AcquiredBlock norm(ctx.dist.params, ctx.dist_stream(), norm_block_);
  const AcquiredBlock head(ctx.dist.params, ctx.dist_stream(), weight_.spec.block);
  ArenaScope scope(ctx.arena.scratch);
  const Tensor y_CD = ctx.arena.scratch.like(x_CD, "last norm");
  const Tensor rstd_C = ctx.arena.scratch.make(ctx.stat(), {x_CD.size(0)}, "last rstd");
  norm_.forward(ctx, x_CD, y_CD, rstd_C);
  ctx.ops.matmul(ctx.stream, Trans::no, Trans::yes, 1.0, y_CD, weight_.value, 0.0, logits_CV);
}

}  // namespace dstrain
