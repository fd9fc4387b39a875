// What a layer needs to run: where to compute, where to put results, and the micro-batch.
#pragma once

#include <vector>

#include "core/backend/ops.h"
#include "core/config/config.h"
#include "core/dist/dist_context.h"
#include "core/tensor/arena.h"

namespace dstrain {

// Under context parallelism: of a rank that holds another part of the same sequences, the tokens
// that this rank's queries see (core/dist/sequence_pieces.h), but for documents.
struct PeerTokens {
  Tensor positions_T;          // i32, as Batch's
  AttentionSegments segments;  // of this rank's queries over the peer's keys; not causal
  bool is_seen() const { return segments.max_queries > 0; }  // a document is on both sides
};

// One micro-batch in device memory. T = sequences * tokens_per_sequence: under context parallelism
// this rank's share of each sequence, under tensor parallelism all tokens of the group.
struct Batch {
  int64_t sequences = 0;
  int64_t tokens_per_sequence = 0;  // that are here
  int64_t sequence_length = 0;      // of the whole sequence
  Tensor tokens_T;                  // i32
  Tensor positions_T;               // i32, from the start of the document
  // i32; below 0 is ignored. targets[0] is the next token, targets[k] the one k further on
  // (multi-token prediction).
  std::vector<Tensor> targets;
  AttentionSegments segments;     // of these queries over the keys of the same tokens
  std::vector<PeerTokens> peers;  // in the order of peer_of() (core/dist/sequence_pieces.h)
  int64_t num_tokens() const { return sequences * tokens_per_sequence; }
};

// Sums over the micro-batches of a step, in device memory; the trainer zeroes and reads them.
struct StepSums {
  Tensor loss_1;     // f64: sum of token losses, next-token prediction
  Tensor mtp_1;      // f64: the same of multi-token prediction, over all its modules
  Tensor balance_1;  // f64: sequence-wise balance loss, already a mean over the global batch
  Tensor counts_LE;  // i64: tokens per MoE layer and expert
};

// Where a layer puts things. `kept` lives until the micro-batch's backward has run. `saved` is
// `kept`, or `scratch` in a forward whose results are recomputed; `cheap` is for what selective
// recomputation makes again: `saved`, or `scratch`. `scratch` is rewound by whoever opened the
// scope; `grads` holds activation gradients until backward_weight has run.
struct Arenas {
  Arena& kept;
  Arena& saved;
  Arena& cheap;
  Arena& scratch;
  Arena& grads;
};

// `slot` belongs to one micro-batch in flight, `scratch` to one compute stream. Activation
// gradients go to scratch, or to the slot where backward_weight runs apart from backward_input.
inline Arenas arenas_for(Recompute recompute, Arena& slot, Arena& scratch,
                         bool split_backward = false) {
  Arena& saved = recompute == Recompute::full ? scratch : slot;
  Arena& cheap = recompute == Recompute::none ? slot : scratch;
  return {slot, saved, cheap, scratch, split_backward ? slot : scratch};
}

// Sees the routing of every MoE layer, and may replace it by a recorded one: so that two runs can
// be compared without a flipped tie being taken for a fault. Called in the first forward of a
// micro-batch. The tensors it is given are device memory.
class RoutingHook {
 public:
  virtual ~RoutingHook() = default;
  virtual void begin_micro_batch(int64_t m) = 0;
  // The recorded choice (i32 [t, K]) for this rank's tokens, valid until backward has run; absent
  // to choose as usual.
  virtual Tensor recorded(DistStream, int moe_index, int64_t tokens) = 0;
  // scores_tE are those of the choice, without the balancing bias bias_E (may be absent).
  virtual void chosen(DistStream, int moe_index, const Tensor& scores_tE, const Tensor& bias_E,
                      const Tensor& indices_tK) = 0;
};

struct StepContext {
  Ops& ops;
  Stream& stream;
  DistContext& dist;
  const Batch& batch;
  Arenas arena;
  DType dtype = DType::f32;              // of activations
  const StepScalars* scalars = nullptr;  // device memory
  StepSums sums;
  double balance_factor = 0;  // aux_loss_alpha / sequences of the global batch
  RoutingHook* routing_hook = nullptr;
  bool training = true;
  Recompute recompute = Recompute::none;
  bool recomputing = false;                 // routing, statistics and counts exist already
  Tensor token_loss_T;                      // S; each token's loss, where wanted
  int64_t logits_bytes = int64_t{8} << 20;  // of logits that exist at once, about

  bool dry = false;  // plans memory: nothing is computed or sent

  DistStream dist_stream() const { return {ops, stream, dry}; }
  // Rows of the residual stream on this rank.
  int64_t local_tokens() const { return batch.num_tokens() / dist.tensor.size(); }
  DType stat() const { return stat_dtype(dtype); }
};

}  // namespace dstrain
