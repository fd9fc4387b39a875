// What a layer needs to run: where to compute, where to put results, and the micro-batch.
#pragma once

#include <vector>

#include "core/backend/ops.h"
#include "core/config/config.h"
#include "core/dist/dist_context.h"
#include "core/tensor/arena.h"

namespace dstrain {

// One micro-batch in device memory. T = sequences * tokens_per_sequence, this rank's share.
struct Batch {
  int64_t sequences = 0;
  int64_t tokens_per_sequence = 0;
  Tensor tokens_T;     // i32
  Tensor positions_T;  // i32, from the start of the document
  // i32; below 0 is ignored. targets[0] is the next token, targets[k] the one k further on (multi-token
  // prediction).
  std::vector<Tensor> targets;
  AttentionSegments segments;
  int64_t num_tokens() const { return sequences * tokens_per_sequence; }
};

// Sums over the micro-batches of a step, in device memory; the trainer zeroes and reads them.
struct StepSums {
  Tensor loss_1;     // f64: sum of token losses, next-token prediction
  Tensor mtp_1;      // f64: the same of multi-token prediction, over all its modules
  Tensor balance_1;  // f64: sequence-wise balance loss, already a mean over the global batch
  Tensor counts_LE;  // i64: tokens per MoE layer and expert
};

// Where a layer puts things. `kept` lives until the micro-batch's backward has run. `saved` is `kept`,
// or `scratch` in a forward whose results are recomputed; `cheap` is for what selective recomputation
// makes again: `saved`, or `scratch`. `scratch` is rewound by whoever opened the scope; `grads` holds
// activation gradients until backward_weight has run.
struct Arenas {
  Arena& kept;
  Arena& saved;
  Arena& cheap;
  Arena& scratch;
  Arena& grads;
};

// `slot` belongs to one micro-batch in flight, `scratch` to one compute stream.
inline Arenas arenas_for(Recompute recompute, Arena& slot, Arena& scratch) {
  Arena& saved = recompute == Recompute::full ? scratch : slot;
  Arena& cheap = recompute == Recompute::none ? slot : scratch;
  return {slot, saved, cheap, scratch, scratch};
}

struct StepContext {
  Ops& ops;
  Stream& stream;
  DistContext& dist;
  const Batch& batch;
  Arenas arena;
  DType dtype = DType::f32;  // of activations
  const StepScalars* scalars = nullptr;  // device memory
  StepSums sums;
  double balance_factor = 0;  // aux_loss_alpha / sequences of the global batch
  bool training = true;
  Recompute recompute = Recompute::none;
  bool recomputing = false;  // routing, statistics and counts exist already
  Tensor token_loss_T;       // S; each token's loss, where wanted

  DistStream dist_stream() const { return {ops, stream}; }
  DType stat() const { return stat_dtype(dtype); }
};

}  // namespace dstrain
