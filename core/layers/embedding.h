// Token embedding: x[t] = W[token[t]]. The table is cut over the vocabulary; a rank adds what it has, and
// the sum over ranks comes to each for its own tokens.
#pragma once

#include "core/layers/sequence_parallel.h"

namespace dstrain {

// tokens_T: all tokens; below 0 gives zeros.
inline void embed(StepContext& ctx, const Parameter& table, const Tensor& tokens_T, const Tensor& x_tD) {
  ArenaScope scope(ctx.arena.scratch);
  const AcquiredBlock values(ctx.dist.params, ctx.dist_stream(), table.spec.block);
  const Tensor x_TD = partial_sums(ctx, x_tD, ctx.arena.scratch, "partial embedding");
  ctx.ops.embedding(ctx.stream, tokens_T, table.value, table.local_begin[0], x_TD);
  reduce_tokens(ctx, x_TD, x_tD);
}

inline void embed_backward(StepContext& ctx, const Parameter& table, const Tensor& tokens_T,
                           const Tensor& dx_tD) {
  ArenaScope scope(ctx.arena.scratch);
  const Tensor dx_TD = gather_tokens(ctx, dx_tD, ctx.arena.scratch, "d embedding");
  const GradTarget target = ctx.dist.params.grad(table);
  ctx.ops.embedding_backward(ctx.stream, tokens_T, dx_TD, table.local_begin[0], target.accumulate,
                             target.grad);
}

}  // namespace dstrain
