#include "core/model/model.h"

#include <cmath>

#include "core/layers/rope.h"

namespace dstrain {

DeepSeekModel::DeepSeekModel(const ModelConfig& config, const ModelPart& part) : config_(config) {
  const int64_t layers = config.num_hidden_layers;
  const int64_t last = part.last_layer < 0 ? layers : part.last_layer;
  Declare declare{parameters_, "", 0, config.initializer_range, part.tensor_ranks, part.expert_ranks};
  const bool first_chunk = part.first_layer == 0, last_chunk = last == layers;
  const bool needs_embedding =
      first_chunk || (last_chunk && (config.tie_word_embeddings || config.num_nextn_predict_layers > 0));
  const Parameter* table = nullptr;
  if (needs_embedding)
    table = &declare.matrix("model.embed_tokens.weight", {config.vocab_size, config.hidden_size},
                            {.tensor_dim = 0});
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
  declare.block = static_cast<int>(layers) + 1;
  const Parameter* head = table;
  if (last_chunk && !config.tie_word_embeddings)
    head = &declare.matrix("lm_head.weight", {config.vocab_size, config.hidden_size},
                           {.tensor_dim = 0});
  if (last_chunk) head_.emplace(declare.in("model.norm"), config, *head);
  for (int64_t k = 0; k < config.num_nextn_predict_layers; ++k) {
    const int layer = static_cast<int>(layers + k);
    const int index = config.n_routed_experts > 0 ? moe_index++ : -1;
    if (!last_chunk) continue;
    declare.block = layer + 2;
    mtp_.emplace_back(config, declare.in("model.layers." + std::to_string(layer)), layer, index, *table,
                      *head);
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

void DeepSeekModel::forward(StepContext& ctx, MicroBatchState& state, const Tensor& x_in_TD) const {
  const int64_t T = ctx.batch.num_tokens(), D = config_.hidden_size;
  Arena& scratch = ctx.arena.scratch;
  state.embedding_TD = x_in_TD;
  if (embedding_) {
    state.embedding_TD = ctx.arena.kept.make(ctx.dtype, {T, D}, "embedding");
    ctx.ops.embedding(ctx.stream, ctx.batch.tokens_T, embedding_->value, 0, state.embedding_TD);
  }
  ArenaScope scope(scratch);
  Arena& outputs = head_ ? scratch : ctx.arena.kept;
  state.delta_out_TD = outputs.make(ctx.dtype, {T, D}, "block output");
  // With full recomputation no block keeps its second sum: one buffer carries the stream.
  const Tensor carry_TD = ctx.recompute == Recompute::full
                              ? outputs.make(ctx.dtype, {T, D}, "residual stream")
                              : Tensor();
  Tensor x_TD = state.embedding_TD, delta_TD;
  ParamStore& params = ctx.dist.params;
  const DistStream dist = ctx.dist_stream();
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const int block = first_block_ + static_cast<int>(i);
    params.acquire_start(dist, block + 1);
    params.acquire_finish(dist, block);
    x_TD = blocks_[i].forward(ctx, rope_, x_TD, delta_TD, state.blocks[i], carry_TD,
                              state.delta_out_TD);
    delta_TD = state.delta_out_TD;
    params.release(dist, block);
  }
  state.x_out_TD = x_TD;
  if (!head_) return;
  if (ctx.batch.targets.empty()) return head_->forward_norm(ctx, x_TD, delta_TD, state.head);
  head_->forward(ctx, x_TD, delta_TD, {ctx.batch.targets.at(0), {}, {}}, 1.0, ctx.sums.loss_1,
                 state.head);
  forward_mtp(ctx, state);
}

double DeepSeekModel::mtp_factor() const {
  return config_.mtp_loss_weight / static_cast<double>(config_.num_nextn_predict_layers);
}

void DeepSeekModel::forward_mtp(StepContext& ctx, MicroBatchState& state) const {
  if (!ctx.training) return;
  Tensor h_TD = state.head.x_TD;
  for (size_t k = 0; k < mtp_.size(); ++k) {
    mtp_[k].forward(ctx, rope_, h_TD, ctx.batch.targets.at(k), ctx.batch.targets.at(k + 1),
                    mtp_factor(), state.mtp[k]);
    h_TD = state.mtp[k].head.x_TD;
  }
}

void DeepSeekModel::backward_mtp(StepContext& ctx, MicroBatchState& state, const Tensor& dh_TD) const {
  Tensor dout_TD;
  for (size_t k = mtp_.size(); k-- > 0;) {
    mtp_[k].backward(ctx, rope_, dout_TD, ctx.batch.targets.at(k), state.mtp[k], dh_TD);
    dout_TD = dh_TD;
  }
}

void DeepSeekModel::backward(StepContext& ctx, MicroBatchState& state, const Tensor& dx_out_TD,
                             const Tensor& dx_in_TD) const {
  const int64_t T = ctx.batch.num_tokens(), D = config_.hidden_size;
  Arena& scratch = ctx.arena.scratch;
  ArenaScope scope(scratch);
  Tensor dout_TD = scratch.make(ctx.dtype, {T, D}, "d block output");
  Tensor din_TD = scratch.make(ctx.dtype, {T, D}, "d block input");
  if (head_) {
    head_->backward(ctx, state.head, dout_TD);
    if (!mtp_.empty()) {
      backward_mtp(ctx, state, din_TD);
      ctx.ops.add(ctx.stream, dout_TD, din_TD, dout_TD);
    }
  } else {
    ctx.ops.convert(ctx.stream, dx_out_TD, dout_TD);
  }
  ParamStore& params = ctx.dist.params;
  const DistStream dist = ctx.dist_stream();
  for (size_t i = blocks_.size(); i-- > 0;) {
    ArenaScope block_scope(scratch);
    const int block = first_block_ + static_cast<int>(i);
    params.acquire_start(dist, block - 1);
    params.acquire_finish(dist, block);
    blocks_[i].backward_input(ctx, rope_, dout_TD, state.blocks[i], din_TD);
    blocks_[i].backward_weight(ctx, state.blocks[i]);
    params.release(dist, block);
    params.grads_ready(dist, block);
    std::swap(dout_TD, din_TD);
  }
  if (embedding_) {
    const GradTarget target = ctx.dist.params.grad(*embedding_);
    ctx.ops.embedding_backward(ctx.stream, ctx.batch.tokens_T, dout_TD, 0, target.accumulate,
                               target.grad);
  } else {
    ctx.ops.convert(ctx.stream, dout_TD, dx_in_TD);
  }
}

void DeepSeekModel::logits(StepContext& ctx, const MicroBatchState& state, int64_t begin, int64_t end,
                           const Tensor& logits_CV) const {
  DSTRAIN_CHECK(head_.has_value(), "logits need the chunk that holds the head");
  head_->logits(ctx, state.head.x_TD.rows(begin, end), logits_CV);
}

void DeepSeekModel::update_router_bias(Ops& ops, Stream& stream, const Tensor& counts_LE,
                                       const StepScalars* scalars) const {
  for (const TransformerBlock& block : blocks_)
    if (block.router()) block.router()->update_bias(ops, stream, counts_LE, scalars);
  for (const MtpModule& module : mtp_)
    if (module.router()) module.router()->update_bias(ops, stream, counts_LE, scalars);
}

}  // namespace dstrain
