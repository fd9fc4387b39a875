// A DeepSeek-style transformer: forward and backward of one micro-batch. It knows no rank, step or
// file; several can live side by side, and each can be one chunk of a pipeline.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "core/config/config.h"
#include "core/layers/loss_head.h"
#include "core/model/mtp_module.h"
#include "core/model/transformer_block.h"

namespace dstrain {

// Which part of the model a chunk holds, and which slices of its parameters.
struct ModelPart {
  int64_t first_layer = 0;
  int64_t last_layer = -1;  // exclusive; -1 means all
  ShardPlace place = {};
};

// What one micro-batch in flight keeps between forward and backward. The tensors lie in its slot arena.
struct MicroBatchState {
  Tensor embedding_tD;  // or what the previous pipeline chunk sent
  std::vector<BlockSaved> blocks;
  LossHeadSaved head;
  std::vector<MtpSaved> mtp;
  Tensor out_tD;  // of a chunk without head: the residual stream, in the slot
};

// Whether the table of embeddings is read at both ends of the model: by a tied head, or by
// prediction modules. Both ends of a pipeline then have one.
bool reads_table_twice(const ModelConfig& config);

class DeepSeekModel {
 public:
  explicit DeepSeekModel(const ModelConfig& config, const ModelPart& part = {});

  ParameterSet& parameters() { return parameters_; }
  const ParameterSet& parameters() const { return parameters_; }
  const ModelConfig& config() const { return config_; }
  int64_t num_moe_layers() const { return num_moe_layers_; }  // of the whole model, MTP included
  bool has_embedding() const { return embedding_ != nullptr; }
  bool has_head() const { return head_.has_value(); }

  // cos and sin for this many positions, in `arena`; copies from host memory, so the stream is
  // synchronised before it returns.
  void make_constants(Backend& backend, Stream& stream, Arena& arena, int64_t positions, DType dtype);
  MicroBatchState make_state() const;

  // Adds to ctx.sums; without targets in the batch it makes no loss. x_in_tD is what the previous chunk
  // sent; absent on the first. ctx.arena.kept must be empty, and everything in it stays until backward
  // has run.
  void forward(StepContext& ctx, MicroBatchState& state, const Tensor& x_in_tD = {}) const;
  // Adds all parameter gradients. dx_out_tD: gradient of what this chunk sent (absent on the last);
  // dx_in_tD receives the gradient of what it was given (absent on the first).
  void backward(StepContext& ctx, MicroBatchState& state, const Tensor& dx_out_tD = {},
                const Tensor& dx_in_tD = {}) const;
  // The same in two calls, so that the second may come later: what is on the way to dx_in first, then the
  // blocks' weight gradients. Without recomputation; ctx.arena.grads is the slot.
  void backward_input(StepContext& ctx, MicroBatchState& state, const Tensor& dx_out_tD,
                      const Tensor& dx_in_tD) const;
  void backward_weight(StepContext& ctx, const MicroBatchState& state) const;
  // Logits of rows [begin, end) of the last forward, which ran with ctx.training off or on; whole model.
  void logits(StepContext& ctx, const MicroBatchState& state, int64_t begin, int64_t end,
              const Tensor& logits_CV) const;
  // Once a step: counts_LE over the whole global batch.
  void update_router_bias(Ops& ops, Stream& stream, const Tensor& counts_LE,
                          const StepScalars* scalars) const;

 private:
  void forward_mtp(StepContext& ctx, MicroBatchState& state) const;
  // Gradient that the prediction modules have for the main residual stream.
  void backward_mtp(StepContext& ctx, MicroBatchState& state, const Tensor& dh_tD) const;
  void backward_head(StepContext& ctx, MicroBatchState& state, const Tensor& dout_tD,
                     const Tensor& dmtp_tD) const;
  void backward_blocks(StepContext& ctx, MicroBatchState& state, const Tensor& dx_out_tD,
                       const Tensor& dx_in_tD, bool split) const;
  double mtp_factor() const;
  int block_of(size_t i) const { return first_block_ + static_cast<int>(i); }

  ModelConfig config_;
  ParameterSet parameters_;
  const Parameter* embedding_ = nullptr;
  const Parameter* head_weight_ = nullptr;
  std::deque<TransformerBlock> blocks_;
  std::optional<LossHead> head_;
  std::deque<MtpModule> mtp_;
  RopeTable rope_;
  int64_t num_moe_layers_ = 0;
  int first_block_ = 1;  // ParameterSpec::block of blocks_[0]
  int head_block_ = 0;   // of the final norm
};

}  // namespace dstrain
