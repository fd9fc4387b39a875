#include "core/engine/train_engine.h"

#include <cstring>
#include <functional>

#include "core/backend/null_ops.h"

namespace dstrain {
namespace {

class NullStream : public Stream {
 public:
  void* native() const override { return nullptr; }
  void synchronize() override {}
};

}  // namespace

TrainEngine::TrainEngine(Backend& backend, const ModelConfig& model, const EngineOptions& options)
    : backend_(backend),
      stream_(backend.make_stream()),
      options_(options),
      model_(model),
      dist_(model_.parameters()),
      dist_context_(dist_.context()),
      slot_("activations"),
      scratch_("scratch"),
      state_(model_.make_state()) {
  plan();
}

int64_t TrainEngine::memory_bytes() const {
  int64_t bytes = 0;
  for (const MemoryOwner& owner : memory_) bytes += owner.bytes;
  return bytes;
}

// The fixed tensors of the run by owner. Runs twice: on measuring arenas, and on real ones.
void TrainEngine::for_each_owner(const std::function<void(const char*, MemoryKind, MakeTensors)>& visit) {
  const int64_t N = parameters().trainable_elements(), T = options_.micro_batch * options_.seq_len;
  const DType dtype = options_.dtype, gradient = stat_dtype(dtype);
  visit("parameters", MemoryKind::device, [=, this](Arena& a) {
    values_ = a.make(dtype, {N}, "parameters");
    buffers_ = a.make(gradient, {parameters().buffer_elements()}, "router bias");
  });
  if (options_.training) {
    visit("gradients", MemoryKind::device,
          [=, this](Arena& a) { grads_ = a.make(gradient, {N}, "gradients"); });
    visit("optimizer state", MemoryKind::device, [=, this](Arena& a) {
      exp_avg_ = a.make(gradient, {N}, "first moment");
      exp_avg_sq_ = a.make(gradient, {N}, "second moment");
    });
  }
  visit("batch and constants", MemoryKind::device, [=, this](Arena& a) {
    batch_.sequences = options_.micro_batch;
    batch_.tokens_per_sequence = options_.seq_len;
    batch_.tokens_T = a.make(DType::i32, {T}, "tokens");
    batch_.positions_T = a.make(DType::i32, {T}, "positions");
    const int64_t targets = 1 + model_.config().num_nextn_predict_layers;
    target_memory_.clear();
    for (int64_t k = 0; k < targets; ++k)
      target_memory_.push_back(a.make(DType::i32, {T}, "targets"));
    batch_.segments.table_N4 = a.make(DType::i32, {T, 4}, "segments");
    batch_.segments.count_1 = a.make(DType::i32, {1}, "segment count");
    model_.make_constants(backend_, *stream_, a, options_.seq_len, dtype);
    make_sums(a);
  });
  visit("host staging", MemoryKind::host, [=, this](Arena& a) {
    host_table_N4_ = a.make(DType::i32, {T + 1, 4}, "segments");
    host_targets_KT_ = a.make(DType::i32, {std::max<int64_t>(1, std::ssize(target_memory_)), T}, "targets");
    host_sums_ = a.make(DType::u8, {sums_memory_.numel()}, "sums");
  });
}

// Everything that is read back after a step lies together.
void TrainEngine::make_sums(Arena& arena) {
  const int64_t L = model_.num_moe_layers(), E = model_.config().n_routed_experts;
  const int64_t scalars = static_cast<int64_t>(sizeof(StepScalars)), counts = L * E * 8;
  sums_memory_ = arena.make(DType::u8, {scalars + 4 * 8 + counts}, "sums");
  char* at = static_cast<char*>(sums_memory_.raw());
  scalars_ = reinterpret_cast<StepScalars*>(at);
  sums_.loss_1 = Tensor(at + scalars, DType::f64, {1});
  sums_.mtp_1 = Tensor(at + scalars + 8, DType::f64, {1});
  sums_.balance_1 = Tensor(at + scalars + 16, DType::f64, {1});
  norm_1_ = Tensor(at + scalars + 24, DType::f64, {1});
  sums_.counts_LE = Tensor(at + scalars + 32, DType::i64, {L, E});
  evaluation_1_ = arena.make(DType::f64, {1}, "evaluation loss");
  token_loss_T_ =
      arena.make(stat_dtype(options_.dtype), {options_.micro_batch * options_.seq_len}, "token losses");
}

void TrainEngine::plan() {
  memory_.clear();
  for_each_owner([&](const char* name, MemoryKind, const MakeTensors& make) {
    Arena arena(name);
    make(arena);
    memory_.push_back({name, arena.peak()});
  });
  bind();
  dry_run();
  memory_.push_back({"activations", slot_.peak()});
  memory_.push_back({"scratch", scratch_.peak()});
}

void TrainEngine::bind() {
  parameters().bind(values_, grads_, buffers_);
  if (options_.training)
    adamw_ = std::make_unique<AdamW>(options_.optimizer, parameters(), values_, grads_, exp_avg_,
                                     exp_avg_sq_, scalars_, norm_1_);
}

// Micro-batches without arithmetic, one of training and one of evaluation: the arenas' peaks are the plan.
void TrainEngine::dry_run() {
  NullOps ops;
  NullStream stream;
  set_targets(true);
  StepContext evaluation = context(ops, stream, false);
  model_.forward(evaluation, state_);
  slot_.reset();
  if (!options_.training) return;
  StepContext training = context(ops, stream, true);
  model_.forward(training, state_);
  model_.backward(training, state_);
  slot_.reset();
}

void TrainEngine::allocate() {
  size_t index = 0;
  auto take = [&](const char* name, MemoryKind kind) {
    const int64_t bytes = memory_.at(index++).bytes;
    blocks_.emplace_back(backend_, std::max<int64_t>(bytes, Arena::kAlignment), kind);
    return Arena(name, blocks_.back().data(), bytes);
  };
  for_each_owner([&](const char* name, MemoryKind kind, const MakeTensors& make) {
    Arena arena = take(name, kind);
    make(arena);
  });
  slot_ = take("activations", MemoryKind::device);
  scratch_ = take("scratch", MemoryKind::device);
  bind();
}

void TrainEngine::initialize(uint64_t seed) {
  Ops& ops = backend_.ops();
  parameters().initialize(ops, *stream_, seed);
  if (!options_.training) return;
  ops.fill(*stream_, grads_, 0.0);  // padding between parameters stays zero
  ops.fill(*stream_, exp_avg_, 0.0);
  ops.fill(*stream_, exp_avg_sq_, 0.0);
  updates_ = 0;
}

StepContext TrainEngine::context(Ops& ops, Stream& stream, bool training) {
  const Recompute recompute = training ? options_.recompute : Recompute::full;
  const double balance =
      model_.config().aux_loss_alpha / static_cast<double>(options_.global_batch);
  return StepContext{.ops = ops,
                     .stream = stream,
                     .dist = dist_context_,
                     .batch = batch_,
                     .arena = arenas_for(recompute, slot_, scratch_),
                     .dtype = options_.dtype,
                     .scalars = scalars_,
                     .sums = sums_,
                     .balance_factor = balance,
                     .training = training,
                     .recompute = recompute,
                     .recomputing = false,
                     .token_loss_T = {}};
}

void TrainEngine::set_targets(bool present) {
  batch_.targets.clear();
  if (present) batch_.targets = target_memory_;
}

// Target k of position t is target k - 1 of the position after it, inside the same segment.
void TrainEngine::stage_targets(const HostBatch& batch) {
  const int64_t T = batch_.num_tokens();
  int32_t* row = host_targets_KT_.data<int32_t>();
  std::memcpy(row, batch.targets_T, static_cast<size_t>(T) * sizeof(int32_t));
  for (size_t k = 1; k < target_memory_.size(); ++k) {
    int32_t* next = row + T;
    for (int64_t s = 0; s < batch.num_segments; ++s) {
      const int64_t begin = batch.segment_offsets[s], end = batch.segment_offsets[s + 1];
      for (int64_t t = begin; t < end; ++t) next[t] = t + 1 < end ? row[t + 1] : -1;
    }
    row = next;
  }
  for (size_t k = 0; k < target_memory_.size(); ++k)
    backend_.copy(*stream_, target_memory_[k].raw(),
                  host_targets_KT_.rows(static_cast<int64_t>(k), static_cast<int64_t>(k) + 1).raw(),
                  target_memory_[k].bytes());
}

void TrainEngine::upload(const HostBatch& batch) {
  const int64_t T = batch_.num_tokens();
  DSTRAIN_CHECK(batch.sequences * batch.tokens_per_sequence == T && batch.num_segments <= T,
                "the micro-batch does not fit the engine's shape");
  int32_t* table = host_table_N4_.data<int32_t>();
  int32_t longest = 0;
  for (int64_t s = 0; s < batch.num_segments; ++s) {
    const int32_t begin = batch.segment_offsets[s], length = batch.segment_offsets[s + 1] - begin;
    const int32_t row[4] = {begin, length, begin, length};
    std::memcpy(table + 4 * s, row, sizeof row);
    longest = std::max(longest, length);
  }
  table[4 * T] = static_cast<int32_t>(batch.num_segments);
  batch_.segments.max_queries = batch_.segments.max_keys = longest;
  backend_.copy(*stream_, batch_.tokens_T.raw(), batch.tokens_T, batch_.tokens_T.bytes());
  backend_.copy(*stream_, batch_.positions_T.raw(), batch.positions_T, batch_.positions_T.bytes());
  backend_.copy(*stream_, batch_.segments.table_N4.raw(), table, batch.num_segments * 16);
  backend_.copy(*stream_, batch_.segments.count_1.raw(), table + 4 * T, 4);
  set_targets(batch.targets_T != nullptr);
  if (batch.targets_T) stage_targets(batch);
}

void TrainEngine::begin_step(double lr, int64_t valid_tokens) {
  valid_tokens_ = valid_tokens;
  StepScalars scalars;
  scalars.lr = lr;
  scalars.loss_scale = valid_tokens > 0 ? 1.0 / static_cast<double>(valid_tokens) : 0.0;
  adamw_->set_bias_corrections(scalars, updates_ + 1);
  std::memset(host_sums_.raw(), 0, static_cast<size_t>(host_sums_.bytes()));
  std::memcpy(host_sums_.raw(), &scalars, sizeof scalars);
  backend_.copy(*stream_, sums_memory_.raw(), host_sums_.raw(), sums_memory_.bytes());
  dist_.params.begin_step();
}

void TrainEngine::accumulate(const HostBatch& batch) {
  upload(batch);
  StepContext ctx = context(backend_.ops(), *stream_, true);
  model_.forward(ctx, state_);
  model_.backward(ctx, state_);
  slot_.reset();
}

void TrainEngine::finish_gradients() {
  dist_.params.finish_step({backend_.ops(), *stream_});
}

StepResult TrainEngine::finish_step() {
  finish_gradients();
  adamw_->step(backend_.ops(), *stream_);
  model_.update_router_bias(backend_.ops(), *stream_, sums_.counts_LE, scalars_);
  backend_.copy(*stream_, host_sums_.raw(), sums_memory_.raw(), sums_memory_.bytes());
  stream_->synchronize();
  return read_result();
}

StepResult TrainEngine::read_result() {
  const char* at = static_cast<const char*>(host_sums_.raw());
  StepScalars scalars;
  std::memcpy(&scalars, at, sizeof scalars);
  double sums[4];
  std::memcpy(sums, at + sizeof scalars, sizeof sums);
  StepResult result;
  const double tokens = static_cast<double>(std::max<int64_t>(1, valid_tokens_));
  const int64_t depth = model_.config().num_nextn_predict_layers;
  result.loss = sums[0] / tokens;
  result.mtp_loss = depth > 0 ? sums[1] / tokens / static_cast<double>(depth) : 0.0;
  result.balance_loss = sums[2];
  result.grad_norm = scalars.grad_norm;
  result.finite = scalars.finite != 0;
  result.expert_counts_LE.resize(static_cast<size_t>(sums_.counts_LE.numel()));
  if (!result.expert_counts_LE.empty())
    std::memcpy(result.expert_counts_LE.data(), at + sizeof scalars + sizeof sums,
                static_cast<size_t>(sums_.counts_LE.bytes()));
  if (result.finite) ++updates_;
  return result;
}

double TrainEngine::evaluate(const HostBatch& batch, double* token_loss_T) {
  upload(batch);
  Ops& ops = backend_.ops();
  ops.fill(*stream_, evaluation_1_, 0.0);
  StepContext ctx = context(ops, *stream_, false);
  ctx.sums.loss_1 = evaluation_1_;
  ctx.token_loss_T = token_loss_T ? token_loss_T_ : Tensor();
  model_.forward(ctx, state_);
  slot_.reset();
  double loss = 0;
  backend_.copy(*stream_, host_sums_.raw(), evaluation_1_.raw(), sizeof loss);
  stream_->synchronize();
  std::memcpy(&loss, host_sums_.raw(), sizeof loss);
  if (token_loss_T) read_floats(token_loss_T_, token_loss_T);
  return loss;
}

void TrainEngine::logits(const HostBatch& batch, int64_t begin, int64_t end, std::vector<float>& out) {
  upload(batch);
  StepContext ctx = context(backend_.ops(), *stream_, false);
  model_.forward(ctx, state_);
  const int64_t V = model_.config().vocab_size;
  out.resize(static_cast<size_t>((end - begin) * V));
  // Row by row, so that the plan needs no room for them.
  for (int64_t row = begin; row < end; ++row) {
    ArenaScope scope(scratch_);
    const Tensor logits_1V = scratch_.make(options_.dtype, {1, V}, "logits");
    model_.logits(ctx, state_, row, row + 1, logits_1V);
    read_floats(logits_1V, out.data() + (row - begin) * V);
  }
  slot_.reset();
}

// Synchronises. F is float or double.
template <class F>
void TrainEngine::read_floats(const Tensor& x, F* out) {
  std::vector<char> host(static_cast<size_t>(x.bytes()));
  backend_.copy(*stream_, host.data(), x.raw(), x.bytes());
  stream_->synchronize();
  for (int64_t i = 0; i < x.numel(); ++i)
    out[i] = x.dtype() == DType::f64 ? static_cast<F>(reinterpret_cast<const double*>(host.data())[i])
                                     : static_cast<F>(reinterpret_cast<const float*>(host.data())[i]);
}

}  // namespace dstrain
