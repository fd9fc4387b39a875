#include "core/model/model.h"

#include <cmath>

#include "core/layers/embedding.h"
#include "core/layers/rope.h"

namespace dstrain {

bool reads_table_twice(const ModelConfig& config) {
  return config.tie_word_embeddings || config.num_nextn_predict_layers > 0;
}

DeepSeekModel::DeepSeekModel(const ModelConfig& config, const ModelPart& part) : config_(config) {
  const int64_t layers = config.num_hidden_layers;
  const int64_t last = part.last_layer < 0 ? layers : part.last_layer;
  Declare declare{parameters_, "", 0, config.initializer_range, part.place, Tie::none};
  const bool first_chunk = part.first_layer == 0, last_chunk = last == layers;
  const bool used_twice = reads_table_twice(config);
  const Parameter* table = nullptr;
  if (first_chunk || (last_chunk && used_twice)) {
    if (used_twice && !(first_chunk && last_chunk)) declare.tie = first_chunk ? Tie::owner : Tie::copy;
    table = &declare.matrix("model.embed_tokens.weight", {config.vocab_size, config.hidden_size},
                            {.tensor_dim = 0, .uneven = true});
    declare.tie = Tie::none;
  }
  if (first_chunk) embedding_ = table;

  first_block_ = static_cast<int>(part.first_layer) + 1;
  int moe_index = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int index = config.is_moe_layer(layer) ? moe_index++ : -1;
    if (layer < part.first_layer || layer >= last) continue;
    declare.block = static_cast<int>(layer) + 1;
    blocks_.emplace_back(config, declare.in("model.layers." + std::to_string(layer)),
                         static_cast<int>(layer), index);
  }
  declare.block = head_block_ = static_cast<int>(layers) + 1;
  head_weight_ = table;
  if (last_chunk && !config.tie_word_embeddings)
    head_weight_ = &declare.matrix("lm_head.weight", {config.vocab_size, config.hidden_size},
                                   {.tensor_dim = 0, .uneven = true});
  if (last_chunk) head_.emplace(declare.in("model.norm"), config, *head_weight_);
  for (int64_t k = 0; k < config.num_nextn_predict_layers; ++k) {
    const int layer = static_cast<int>(layers + k);
    const int index = config.n_routed_experts > 0 ? moe_index++ : -1;
    if (!last_chunk) continue;
    declare.block = layer + 2;
    mtp_.emplace_back(config, declare.in("model.layers." + std::to_string(layer)), layer, index, *table,
                      *head_weight_);
  }
  num_moe_layers_ = moe_index;
  parameters_.finish_layout();
}

void DeepSeekModel::make_constants(Backend& backend, Stream& stream, Arena& arena, int64_t positions,
                                   DType dtype) {
  const std::vector<double> frequency = rope_frequencies(config_);
  const double factor = rope_attention_factor(config_.rope_scaling);
  const int64_t pairs = static_cast<int64_t>(frequency.size());
  rope_.interleaved = config_.rope_is_interleaved();
  rope_.cos_PR = arena.make(stat_dtype(dtype), {positions, pairs}, "rope cosines");
  rope_.sin_PR = arena.make(stat_dtype(dtype), {positions, pairs}, "rope sines");
  if (arena.measuring()) return;
  auto upload = [&](const Tensor& table, auto value) {
    auto fill = [&]<class F>(F) {
      std::vector<F> host(static_cast<size_t>(table.numel()));
      for (int64_t p = 0; p < positions; ++p)
        for (int64_t i = 0; i < pairs; ++i)
          host[static_cast<size_t>(p * pairs + i)] = static_cast<F>(
              value(static_cast<double>(p) * frequency[static_cast<size_t>(i)]) * factor);
      backend.copy(stream, table.raw(), host.data(), table.bytes());
      stream.synchronize();
    };
    table.dtype() == DType::f64 ? fill(double{}) : fill(float{});
  };
  upload(rope_.cos_PR, [](double x) { return std::cos(x); });
  upload(rope_.sin_PR, [](double x) { return std::sin(x); });
}

MicroBatchState DeepSeekModel::make_state() const {
  MicroBatchState state;
  state.blocks.resize(blocks_.size());
  state.mtp.resize(mtp_.size());
  return state;
}

void DeepSeekModel::forward(StepContext& ctx, MicroBatchState& state, const Tensor& x_in_tD) const {
  const int64_t t = ctx.local_tokens(), D = config_.hidden_size;
  Arena& scratch = ctx.arena.scratch;
  ParamStore& params = ctx.dist.params;
  const DistStream dist = ctx.dist_stream();
  if (!blocks_.empty()) params.acquire_start(dist, block_of(0));
  state.embedding_tD = x_in_tD;
  if (embedding_) {
    state.embedding_tD = ctx.arena.kept.make(ctx.dtype, {t, D}, "embedding");
    embed(ctx, *embedding_, ctx.batch.tokens_T, state.embedding_tD);
  }
  if (!head_) state.out_tD = ctx.arena.kept.make(ctx.dtype, {t, D}, "output of the chunk");
  ArenaScope scope(scratch);
  const Tensor delta_out_tD = scratch.make(ctx.dtype, {t, D}, "block output");
  // With full recomputation no block keeps its second sum: one buffer carries the stream.
  const Tensor carry_tD = ctx.recompute == Recompute::full
                              ? scratch.make(ctx.dtype, {t, D}, "residual stream")
                              : Tensor();
  Tensor x_tD = state.embedding_tD, delta_tD;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (i + 1 < blocks_.size())
      params.acquire_start(dist, block_of(i + 1));
    else if (head_)
      params.acquire_start(dist, head_weight_->spec.block);
    const AcquiredBlock values(params, dist, block_of(i));
    x_tD = blocks_[i].forward(ctx, rope_, x_tD, delta_tD, state.blocks[i], carry_tD, delta_out_tD);
    delta_tD = delta_out_tD;
  }
  if (!head_) return ctx.ops.add(ctx.stream, x_tD, delta_tD, state.out_tD);
  if (ctx.batch.targets.empty()) return head_->forward_norm(ctx, x_tD, delta_tD, state.head);
  head_->forward(ctx, x_tD, delta_tD, {ctx.batch.targets.at(0), {}, {}}, 1.0, ctx.sums.loss_1,
                 state.head);
  forward_mtp(ctx, state);
}

double DeepSeekModel::mtp_factor() const {
  return config_.mtp_loss_weight / static_cast<double>(config_.num_nextn_predict_layers);
}

void DeepSeekModel::forward_mtp(StepContext& ctx, MicroBatchState& state) const {
  if (!ctx.training) return;
  Tensor h_tD = state.head.x_tD;
  for (size_t k = 0; k < mtp_.size(); ++k) {
    const AcquiredBlock values(ctx.dist.params, ctx.dist_stream(), mtp_[k].block());
    mtp_[k].forward(ctx, rope_, h_tD, ctx.batch.targets.at(k), ctx.batch.targets.at(k + 1),
                    mtp_factor(), state.mtp[k]);
    h_tD = state.mtp[k].head.x_tD;
  }
}

void DeepSeekModel::backward_mtp(StepContext& ctx, MicroBatchState& state, const Tensor& dh_tD) const {
  Tensor dout_tD;
  for (size_t k = mtp_.size(); k-- > 0;) {
    const AcquiredBlock values(ctx.dist.params, ctx.dist_stream(), mtp_[k].block());
    mtp_[k].backward(ctx, rope_, dout_tD, ctx.batch.targets.at(k), state.mtp[k], dh_tD);
    dout_tD = dh_tD;
    ctx.dist.params.grads_ready(ctx.dist_stream(), mtp_[k].block());
  }
}

void DeepSeekModel::backward_head(StepContext& ctx, MicroBatchState& state, const Tensor& dout_tD,
                                  const Tensor& dmtp_tD) const {
  head_->backward(ctx, state.head, dout_tD);
  if (!mtp_.empty()) {
    backward_mtp(ctx, state, dmtp_tD);
    ctx.ops.add(ctx.stream, dout_tD, dmtp_tD, dout_tD);
  }
  ctx.dist.params.grads_ready(ctx.dist_stream(), head_block_);
}

void DeepSeekModel::backward(StepContext& ctx, MicroBatchState& state, const Tensor& dx_out_tD,
                             const Tensor& dx_in_tD) const {
  backward_blocks(ctx, state, dx_out_tD, dx_in_tD, false);
}

void DeepSeekModel::backward_input(StepContext& ctx, MicroBatchState& state, const Tensor& dx_out_tD,
                                   const Tensor& dx_in_tD) const {
  DSTRAIN_CHECK(ctx.recompute == Recompute::none && &ctx.arena.grads != &ctx.arena.scratch,
                "a backward in two parts keeps all activations and gradients in the slot");
  backward_blocks(ctx, state, dx_out_tD, dx_in_tD, true);
}

// In a split backward every block's output gradient stays in the slot; otherwise two buffers take turns.
void DeepSeekModel::backward_blocks(StepContext& ctx, MicroBatchState& state, const Tensor& dx_out_tD,
                                    const Tensor& dx_in_tD, bool split) const {
  const int64_t t = ctx.local_tokens(), D = config_.hidden_size;
  ParamStore& params = ctx.dist.params;
  const DistStream dist = ctx.dist_stream();
  ArenaScope scope(ctx.arena.scratch);
  Tensor dout_tD = ctx.arena.grads.make(ctx.dtype, {t, D}, "d block output");
  Tensor din_tD = ctx.arena.grads.make(ctx.dtype, {t, D}, "d block input");
  if (!blocks_.empty()) params.acquire_start(dist, block_of(blocks_.size() - 1));
  if (head_)
    backward_head(ctx, state, dout_tD, din_tD);
  else
    ctx.ops.convert(ctx.stream, dx_out_tD, dout_tD);
  for (size_t i = blocks_.size(); i-- > 0;) {
    if (split && i + 1 < blocks_.size())
      din_tD = ctx.arena.grads.make(ctx.dtype, {t, D}, "d block input");
    ArenaScope block_scope(ctx.arena.scratch);
    if (i > 0) params.acquire_start(dist, block_of(i - 1));
    {
      const AcquiredBlock values(params, dist, block_of(i));
      blocks_[i].backward_input(ctx, rope_, dout_tD, state.blocks[i], din_tD);
      if (!split) blocks_[i].backward_weight(ctx, state.blocks[i]);
    }
    if (!split) params.grads_ready(dist, block_of(i));
    std::swap(dout_tD, din_tD);
  }
  if (!embedding_) {
    ctx.ops.convert(ctx.stream, dout_tD, dx_in_tD);
  } else {
    embed_backward(ctx, *embedding_, ctx.batch.tokens_T, dout_tD);
  }
  // A table that is also head or prediction input had contributions above.
  if (embedding_ || (head_ && parameters_.find("model.embed_tokens.weight")))
    params.grads_ready(dist, 0);
}

void DeepSeekModel::backward_weight(StepContext& ctx, const MicroBatchState& state) const {
  for (size_t i = blocks_.size(); i-- > 0;) {
    ArenaScope scope(ctx.arena.scratch);
    blocks_[i].backward_weight(ctx, state.blocks[i]);
    ctx.dist.params.grads_ready(ctx.dist_stream(), block_of(i));
  }
}

void DeepSeekModel::logits(StepContext& ctx, const MicroBatchState& state, int64_t begin, int64_t end,
                           const Tensor& logits_CV) const {
  DSTRAIN_CHECK(head_.has_value(), "logits need the chunk that holds the head");
  head_->logits(ctx, state.head.x_tD.rows(begin, end), logits_CV);
}

void DeepSeekModel::update_router_bias(Ops& ops, Stream& stream, const Tensor& counts_LE,
                                       const StepScalars* scalars) const {
  for (const TransformerBlock& block : blocks_)
    if (block.router()) block.router()->update_bias(ops, stream, counts_LE, scalars);
  for (const MtpModule& module : mtp_)
    if (module.router()) module.router()->update_bias(ops, stream, counts_LE, scalars);
}

}  // namespace dstrain
