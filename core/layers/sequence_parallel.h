// The two crossings of tensor and sequence parallelism (core/dist/dist_context.h), as layers use them:
// from this rank's tokens to all tokens before a projection that is cut over its outputs, and from
// partial sums over all tokens to this rank's tokens after one that is cut over its inputs. With one rank
// both are the tensor itself, and nothing is copied.
#pragma once

#include "core/layers/step_context.h"

namespace dstrain {

// All tokens' rows [T, ...] in rank order, in `arena` where a copy is needed.
inline Tensor gather_tokens(StepContext& ctx, const Tensor& x_tD, Arena& arena, const char* tag) {
  TensorParallel& tensor = ctx.dist.tensor;
  if (tensor.size() == 1) return x_tD;
  const Tensor x_TD = arena.make(x_tD.dtype(), {x_tD.size(0) * tensor.size(), x_tD.size(1)}, tag);
  tensor.gather_start(ctx.dist_stream(), x_tD, x_TD);
  tensor.gather_finish(ctx.dist_stream(), x_tD, x_TD);
  return x_TD;
}

// Where partial sums over all tokens go that reduce_tokens() brings to out_tD.
inline Tensor partial_sums(StepContext& ctx, const Tensor& out_tD, Arena& arena, const char* tag) {
  const int size = ctx.dist.tensor.size();
  return size == 1 ? out_tD : arena.make(out_tD.dtype(), {out_tD.size(0) * size, out_tD.size(1)}, tag);
}

inline void reduce_tokens(StepContext& ctx, const Tensor& partial_TD, const Tensor& out_tD) {
  TensorParallel& tensor = ctx.dist.tensor;
  if (tensor.size() == 1) return;
  tensor.reduce_scatter_start(ctx.dist_stream(), partial_TD, out_tD);
  tensor.reduce_scatter_finish(ctx.dist_stream(), partial_TD, out_tD);
}

}  // namespace dstrain
