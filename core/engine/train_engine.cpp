#include "core/engine/train_engine.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/engine/parameter_io.h"

namespace dstrain {
namespace {

// Logits that exist at once: what a CPU's caches hold, and enough rows for a GPU's products.
constexpr int64_t kCpuLogits = int64_t{8} << 20, kGpuLogits = int64_t{2} << 30;

}  // namespace

TrainEngine::TrainEngine(Backend& backend, const ModelConfig& model, const EngineOptions& options,
                         Distribution* distribution)
    : backend_(backend),
      stream_(backend.make_stream()),
      state_is_ready_(backend.make_event()),
      options_(options),
      distribution_(distribution ? *distribution : one_rank_),
      adamw_(options.optimizer),
      scratch_("scratch") {
  make_chunks(model);
  for (int i = 0; i < options_.loaded_batches; ++i)
    batches_.emplace_back(options_.micro_batch, options_.seq_len, 1 + model.num_nextn_predict_layers,
                          distribution_.place().context);
  batch_is_last_.resize(batches_.size());
  plan();
}

void TrainEngine::make_chunks(const ModelConfig& model) {
  const RankPlace& place = distribution_.place();
  chunks_.reserve(options_.chunks.size());
  for (const EngineChunk& part : options_.chunks) {
    Chunk& chunk = chunks_.emplace_back();
    chunk.model = std::make_unique<DeepSeekModel>(
        model, ModelPart{part.first_layer, part.last_layer, {place.tensor, place.expert}});
    chunk.first = chunk.model->has_embedding();
    chunk.last = chunk.model->has_head();
    chunk.store = distribution_.make_param_store(
        chunk.model->parameters(), {options_.dtype, options_.training, options_.moments});
    chunk.context = std::make_unique<DistContext>(
        DistContext{distribution_.tensor(), distribution_.dispatcher(), distribution_.kv(),
                    distribution_.sequences(), *chunk.store});
    for (int i = 0; i < part.in_flight; ++i) chunk.slots.emplace_back(chunk.model->make_state());
    for (const ParameterGroup& group : chunk.model->parameters().groups())
      if (chunk.blocks.empty() || chunk.blocks.back() != group.block)
        chunk.blocks.push_back(group.block);
  }
}

void TrainEngine::initialize(uint64_t seed) {
  for (Chunk& chunk : chunks_) {
    chunk.store->clear(dist_stream());
    for (const StateSlice& slice : chunk.store->loaded())
      if (slice.kind == "param") initialize_slice(slice, seed);
  }
  set_progress(0, 0);
}

// bf16 parameters start as f32 ones do, so that a run's master values do not depend on its compute
// type. Where the lower half belongs to another rank, it is needed all the same to round alike.
void TrainEngine::initialize_slice(const StateSlice& slice, uint64_t seed) {
  Ops& ops = backend_.ops();
  const Parameter& p = *slice.parameter;
  if (slice.data.dtype() != DType::bf16)
    return initialize_elements(ops, *stream_, p, slice.begin, slice.end, slice.data, seed);
  const int64_t elements = slice.end - slice.begin;
  for (int64_t at = 0; at < elements; at += master_chunk_N_.numel()) {
    const int64_t n = std::min(master_chunk_N_.numel(), elements - at);
    const Tensor master = master_chunk_N_.rows(0, n);
    initialize_elements(ops, *stream_, p, slice.begin + at, slice.begin + at + n, master, seed);
    ops.split_master(*stream_, master, slice.data.rows(at, at + n),
                     slice.low.defined() ? slice.low.rows(at, at + n) : low_chunk_N_.rows(0, n));
  }
}

void TrainEngine::set_progress(int64_t steps, int64_t updates) {
  DSTRAIN_CHECK(pending_.empty(), "results of steps are outstanding");
  steps_begun_ = steps;
  StepScalars scalars;
  scalars.updates = updates_ = updates;
  std::memcpy(host_results_2X_.raw(), &scalars, sizeof scalars);
  backend_.copy(*stream_, scalars_, host_results_2X_.raw(), sizeof scalars);
  stream_->synchronize();
}

StepContext TrainEngine::context(Ops& ops, Stream& stream, Chunk& chunk, Slot& slot, const Batch& batch,
                                 Pass pass) {
  const bool training = pass == Pass::training;
  const Recompute recompute = training ? options_.recompute : Recompute::full;
  const double alpha = chunk.model->config().aux_loss_alpha;
  return StepContext{
      .ops = ops,
      .stream = stream,
      .dist = *chunk.context,
      .batch = batch,
      .arena = arenas_for(recompute, slot.arena, scratch_, training && options_.split_backward),
      .dtype = options_.dtype,
      .scalars = scalars_,
      .sums = sums_,
      .balance_factor = alpha / static_cast<double>(options_.global_batch),
      .routing_hook = training ? routing_hook_ : nullptr,
      .training = training,
      .recompute = recompute,
      .recomputing = false,
      .token_loss_T = {},
      .logits_bytes = backend_.is_cpu() ? kCpuLogits : kGpuLogits,
      .dry = false};
}

StepContext TrainEngine::context(Chunk& chunk, Slot& slot, int64_t m, Pass pass) {
  return context(backend_.ops(), *stream_, chunk, slot, batch_of(m).batch(), pass);
}

TrainEngine::Slot& TrainEngine::slot_of(int chunk, int64_t m) {
  std::vector<Slot>& slots = chunk_at(chunk).slots;
  return slots[static_cast<size_t>(m) % slots.size()];
}

void TrainEngine::begin_step(double lr, int64_t valid_tokens) {
  valid_tokens_ = valid_tokens;
  reduced_ = false;
  const StepInputs inputs{lr, valid_tokens > 0 ? 1.0 / static_cast<double>(valid_tokens) : 0.0};
  // Two stagings take turns: the step before the last has been read, so its inputs are not needed any more.
  DSTRAIN_CHECK(!free_.empty(), "take the result of an earlier step first");
  void* const staging = host_inputs_.rows(steps_begun_ % 2, steps_begun_ % 2 + 1).raw();
  std::memcpy(staging, &inputs, sizeof inputs);
  backend_.copy(*stream_, &scalars_->in, staging, sizeof inputs);
  backend_.copy(*stream_, zeroed_.raw(), host_zeros_.raw(), zeroed_.bytes());
  for (Chunk& chunk : chunks_) chunk.store->begin_step(steps_begun_);
  ++steps_begun_;
}

void TrainEngine::load(int64_t m, const HostBatch& batch, bool last_of_step) {
  batch_of(m).load(backend_, *stream_, batch);
  batch_is_last_[static_cast<size_t>(m) % batches_.size()] = last_of_step;
}

Tensor TrainEngine::receive_buffer(int index, int64_t m, bool gradient) {
  Slot& slot = slot_of(index, m);
  const Chunk& chunk = chunk_at(index);
  const int64_t t = batches_[0].batch().num_tokens() / distribution_.tensor().size();
  const int64_t D = chunk.model->config().hidden_size;
  if (gradient) return slot.dx_out_tD;
  DSTRAIN_CHECK(slot.micro_batch < 0, "the slot is in use");
  slot.arena.reset();
  auto room = [&](bool wanted, const char* tag) {
    return wanted ? slot.arena.make(options_.dtype, {t, D}, tag) : Tensor();
  };
  slot.x_in_tD = room(!chunk.first, "input of the chunk");
  slot.dx_in_tD = room(!chunk.first && options_.training, "d input of the chunk");
  slot.dx_out_tD = room(!chunk.last && options_.training, "d output of the chunk");
  return slot.x_in_tD;
}

Tensor TrainEngine::forward(int index, int64_t m, const Tensor& x_in_tD, Pass pass) {
  Chunk& chunk = chunk_at(index);
  Slot& slot = slot_of(index, m);
  if (!x_in_tD.defined()) receive_buffer(index, m, false);
  DSTRAIN_CHECK(slot.micro_batch < 0, "micro-batch " + std::to_string(slot.micro_batch) +
                                          " is still in the slot of micro-batch " + std::to_string(m));
  StepContext ctx = context(chunk, slot, m, pass);
  if (ctx.routing_hook) ctx.routing_hook->begin_micro_batch(m);
  if (pass == Pass::evaluation) ctx.sums.loss_1 = evaluation_1_;
  chunk.model->forward(ctx, slot.state, x_in_tD);
  if (pass == Pass::training) slot.micro_batch = m;
  return slot.state.out_tD;
}

TrainEngine::Slot& TrainEngine::begin_backward(int index, int64_t m, const Tensor& dx_out_tD) {
  Chunk& chunk = chunk_at(index);
  Slot& slot = slot_of(index, m);
  DSTRAIN_CHECK(slot.micro_batch == m, "the backward of a micro-batch follows its forward");
  DSTRAIN_CHECK(dx_out_tD.defined() != chunk.last, "every chunk but the last is given a gradient");
  return slot;
}

Tensor TrainEngine::backward(int index, int64_t m, const Tensor& dx_out_tD) {
  Chunk& chunk = chunk_at(index);
  Slot& slot = begin_backward(index, m, dx_out_tD);
  chunk.store->begin_micro_batch(batch_is_last_[static_cast<size_t>(m) % batches_.size()]);
  StepContext ctx = context(chunk, slot, m, Pass::training);
  chunk.model->backward(ctx, slot.state, dx_out_tD, slot.dx_in_tD);
  slot.micro_batch = -1;
  return slot.dx_in_tD;
}

Tensor TrainEngine::backward_input(int index, int64_t m, const Tensor& dx_out_tD) {
  Chunk& chunk = chunk_at(index);
  Slot& slot = begin_backward(index, m, dx_out_tD);
  chunk.store->begin_micro_batch(batch_is_last_[static_cast<size_t>(m) % batches_.size()]);
  StepContext ctx = context(chunk, slot, m, Pass::training);
  chunk.model->backward_input(ctx, slot.state, dx_out_tD, slot.dx_in_tD);
  return slot.dx_in_tD;
}

void TrainEngine::backward_weight(int index, int64_t m) {
  Chunk& chunk = chunk_at(index);
  Slot& slot = slot_of(index, m);
  DSTRAIN_CHECK(slot.micro_batch == m, "weight gradients follow the input gradients");
  chunk.store->begin_micro_batch(batch_is_last_[static_cast<size_t>(m) % batches_.size()]);
  StepContext ctx = context(chunk, slot, m, Pass::training);
  chunk.model->backward_weight(ctx, slot.state);
  slot.micro_batch = -1;
}

void TrainEngine::accumulate(const HostBatch& batch, bool last_of_step) {
  load(0, batch, last_of_step);
  forward(0, 0);
  backward(0, 0);
}

void TrainEngine::reduce_gradients() {
  if (std::exchange(reduced_, true)) return;
  for (Chunk& chunk : chunks_) chunk.store->reduce_gradients(dist_stream());
}

// Every contribution counts once: tensor-parallel ranks have the same losses, and ranks that share a
// sequence the same balance loss.
void TrainEngine::sum_results() {
  Ops& ops = backend_.ops();
  const RankPlace& place = distribution_.place();
  if (place.in_world().size == 1) return;
  if (place.tensor.rank != 0) ops.fill(*stream_, sums_6_.rows(0, 2), 0.0);
  if (place.tensor.rank != 0 || place.context.rank != 0) ops.fill(*stream_, sums_.balance_1, 0.0);
  distribution_.sum_over_ranks(dist_stream(), sums_6_);
  if (sums_.counts_LE.numel() > 0) distribution_.sum_over_ranks(dist_stream(), sums_.counts_LE);
}

void TrainEngine::request(bool leave, bool save) {
  if (leave) backend_.ops().fill(*stream_, sums_6_.rows(3, 4), 1.0);
  if (save) backend_.ops().fill(*stream_, sums_6_.rows(4, 5), 1.0);
}

void TrainEngine::finish_step() {
  DSTRAIN_CHECK(!free_.empty(), "take the result of an earlier step first");
  Ops& ops = backend_.ops();
  reduce_gradients();
  ops.fill(*stream_, norm_1_, 0.0);
  for (Chunk& chunk : chunks_) chunk.store->add_norm(dist_stream(), norm_1_);
  sum_results();
  adamw_.clip(ops, *stream_, norm_1_, scalars_);
  if (state_is_copied_) std::exchange(state_is_copied_, nullptr)->wait_on(*stream_);
  for (Chunk& chunk : chunks_) {
    update_parameters(chunk);
    chunk.model->update_router_bias(ops, *stream_, sums_.counts_LE, scalars_);
    chunk.store->end_step(dist_stream(), scalars_);
  }
  Pending pending = std::move(free_.back());
  free_.pop_back();
  pending.valid_tokens = valid_tokens_;
  backend_.copy(*stream_, pending.host.raw(), read_back_.raw(), read_back_.bytes());
  pending.ready->record(*stream_);
  pending_.push_back(std::move(pending));
}

// In the order of a forward pass, so that the first blocks are where they are needed when it begins.
void TrainEngine::update_parameters(Chunk& chunk) {
  const std::span<const OptimizerRange> ranges = chunk.store->ranges();
  auto range = ranges.begin();
  for (const int block : chunk.blocks) {
    for (; range != ranges.end() && range->block == block; ++range)
      adamw_.update(backend_.ops(), *stream_, *range, scalars_);
    chunk.store->publish(dist_stream(), block);
  }
  DSTRAIN_CHECK(range == ranges.end(), "the ranges of a store are not in the order of blocks");
}

StepResult TrainEngine::take_result() {
  DSTRAIN_CHECK(!pending_.empty(), "no step has a result that was not taken");
  Pending pending = std::move(pending_.front());
  pending_.pop_front();
  pending.ready->synchronize();
  const char* at = static_cast<const char*>(pending.host.raw());
  StepScalars scalars;
  std::memcpy(&scalars, at, sizeof scalars);
  double sums[6];  // those of sums_6_
  std::memcpy(sums, at + sizeof scalars, sizeof sums);
  StepResult result;
  const double tokens = static_cast<double>(std::max<int64_t>(1, pending.valid_tokens));
  const int64_t depth = chunks_[0].model->config().num_nextn_predict_layers;
  result.loss = sums[0] / tokens;
  result.mtp_loss = depth > 0 ? sums[1] / tokens / static_cast<double>(depth) : 0.0;
  result.balance_loss = sums[2];
  result.grad_norm = scalars.grad_norm;
  result.finite = scalars.finite != 0;
  result.updates = updates_ = scalars.updates;
  result.ranks_leaving = static_cast<int64_t>(sums[3]);
  result.ranks_saving = static_cast<int64_t>(sums[4]);
  result.expert_counts_LE.resize(static_cast<size_t>(sums_.counts_LE.numel()));
  if (!result.expert_counts_LE.empty())
    std::memcpy(result.expert_counts_LE.data(), at + sizeof scalars + sizeof sums,
                static_cast<size_t>(sums_.counts_LE.bytes()));
  free_.push_back(std::move(pending));
  return result;
}

void TrainEngine::begin_evaluation() { backend_.ops().fill(*stream_, evaluation_1_, 0.0); }

double TrainEngine::finish_evaluation() {
  if (distribution_.place().tensor.rank != 0) backend_.ops().fill(*stream_, evaluation_1_, 0.0);
  distribution_.sum_over_ranks(dist_stream(), evaluation_1_);
  backend_.copy(*stream_, host_evaluation_1_.raw(), evaluation_1_.raw(), evaluation_1_.bytes());
  stream_->synchronize();
  return *host_evaluation_1_.data<double>();
}

double TrainEngine::evaluate(const HostBatch& batch, double* token_loss_T) {
  begin_evaluation();
  load(0, batch);
  Chunk& chunk = chunk_at(0);
  Slot& slot = slot_of(0, 0);
  receive_buffer(0, 0, false);
  StepContext ctx = context(chunk, slot, 0, Pass::evaluation);
  ctx.sums.loss_1 = evaluation_1_;
  ctx.token_loss_T = token_loss_T ? token_loss_T_ : Tensor();
  chunk.model->forward(ctx, slot.state);
  if (token_loss_T) {
    const std::vector<double> losses = read_doubles(backend_, *stream_, token_loss_T_);
    std::copy(losses.begin(), losses.end(), token_loss_T);
  }
  return finish_evaluation();
}

void TrainEngine::logits(const HostBatch& batch, int64_t begin, int64_t end, std::vector<float>& out) {
  load(0, batch);
  Chunk& chunk = chunk_at(0);
  Slot& slot = slot_of(0, 0);
  receive_buffer(0, 0, false);
  StepContext ctx = context(chunk, slot, 0, Pass::evaluation);
  chunk.model->forward(ctx, slot.state);
  const int64_t V = chunk.model->config().vocab_size;
  out.resize(static_cast<size_t>((end - begin) * V));
  // Row by row, so that the plan needs no room for them.
  for (int64_t row = begin; row < end; ++row) {
    ArenaScope scope(scratch_);
    const Tensor logits_1V = scratch_.make(options_.dtype, {1, V}, "logits");
    chunk.model->logits(ctx, slot.state, row, row + 1, logits_1V);
    const std::vector<float> values = read_tensor(backend_, *stream_, logits_1V);
    std::copy(values.begin(), values.end(), out.begin() + (row - begin) * V);
  }
}

namespace {

void append(std::vector<StateSlice>& all, std::vector<StateSlice> more) {
  all.insert(all.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
}

}  // namespace

std::vector<StateSlice> TrainEngine::saved_state() const {
  std::vector<StateSlice> all;
  for (const Chunk& chunk : chunks_) append(all, chunk.store->saved());
  return all;
}

std::vector<StateSlice> TrainEngine::loaded_state() const {
  std::vector<StateSlice> all;
  for (const Chunk& chunk : chunks_) append(all, chunk.store->loaded());
  return all;
}

void TrainEngine::begin_state_copy(Stream& copies) {
  state_is_ready_->record(*stream_);
  state_is_ready_->wait_on(copies);
  for (Chunk& chunk : chunks_) chunk.store->begin_state_copy({backend_.ops(), copies, false});
}

void TrainEngine::hold_state(Event& copied) {
  state_is_copied_ = &copied;
  for (Chunk& chunk : chunks_) chunk.store->hold_state(copied);
}

}  // namespace dstrain
