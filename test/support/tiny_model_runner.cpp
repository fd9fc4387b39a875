#include "test/support/tiny_model_runner.h"

#include <utility>

namespace dstrain::test {
namespace {

constexpr int64_t kArenaBytes = 4 << 20;

}  // namespace

Flight::Flight(Backend& backend, const DeepSeekModel& model, const TinyBatch& batch)
    : slot("activations"),
      state(model.make_state()),
      host_(batch),
      memory_(backend, kArenaBytes, MemoryKind::device) {
  slot = Arena("activations", memory_.data(), kArenaBytes);
  const int64_t T = std::ssize(host_.tokens);
  batch_.sequences = host_.sequences();
  batch_.tokens_per_sequence = batch_.sequence_length = host_.seq_len();
  batch_.tokens_T = Tensor(host_.tokens.data(), DType::i32, {T});
  batch_.positions_T = Tensor(host_.positions.data(), DType::i32, {T});

  const HostBatch view = host_.host();
  int32_t longest = 0;
  for (int64_t s = 0; s < view.num_segments; ++s) {
    const int32_t begin = view.segment_offsets[s], length = view.segment_offsets[s + 1] - begin;
    segments_.insert(segments_.end(), {begin, length, begin, length});
    longest = std::max(longest, length);
  }
  num_segments_ = static_cast<int32_t>(view.num_segments);
  batch_.segments = {Tensor(segments_.data(), DType::i32, {view.num_segments, 4}),
                     Tensor(&num_segments_, DType::i32, {1}), longest, longest};

  // Target k is the token k + 1 further on in the same document.
  targets_.push_back(host_.targets);
  for (int64_t k = 0; k < model.config().num_nextn_predict_layers; ++k) {
    std::vector<int32_t> next(host_.tokens.size(), -1);
    for (int64_t s = 0; s < view.num_segments; ++s)
      for (int32_t t = view.segment_offsets[s]; t + 1 < view.segment_offsets[s + 1]; ++t)
        next[static_cast<size_t>(t)] = targets_.back()[static_cast<size_t>(t + 1)];
    targets_.push_back(std::move(next));
  }
  for (std::vector<int32_t>& target : targets_)
    batch_.targets.push_back(Tensor(target.data(), DType::i32, {T}));
}

std::vector<double> Flight::output() const {
  std::vector<double> values(static_cast<size_t>(state.out_tD.numel()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = element(state.out_tD, static_cast<int64_t>(i));
  return values;
}

ModelRunner::ModelRunner(Backend& backend, const ModelConfig& config, DType dtype,
                         Recompute recompute, const ModelPart& part)
    : backend_(backend),
      stream_(backend.make_stream()),
      dtype_(dtype),
      recompute_(recompute),
      model_(config, part),
      store_(model_.parameters(), {dtype, true}),
      dist_context_{dist_.tensor(), dist_.dispatcher(), dist_.kv(), dist_.sequences(), store_},
      scratch_("scratch"),
      counts_(static_cast<size_t>(model_.num_moe_layers() * config.n_routed_experts)) {
  auto take = [&](int64_t bytes) {
    return memory_.emplace_back(backend, bytes, MemoryKind::device).data();
  };
  store_.make_memory([&](const char* owner, MemoryKind, const std::function<void(Arena&)>& make) {
    Arena measure(owner);
    make(measure);
    Arena arena(owner, take(measure.peak()), measure.peak());
    make(arena);
  });
  Arena constants("constants", take(kArenaBytes), kArenaBytes);
  model_.make_constants(backend, *stream_, constants, config.max_position_embeddings, dtype);
  scratch_ = Arena("scratch", take(kArenaBytes), kArenaBytes);
}

void ModelRunner::initialize(uint64_t seed) {
  parameters().initialize(backend_.ops(), *stream_, seed);
  randomize_constants(parameters(), seed + 1);
}

void ModelRunner::begin(int64_t valid_tokens) {
  scalars_ = {};
  scalars_.in.loss_scale = 1.0 / static_cast<double>(valid_tokens);
  sums_.assign(3, 0.0);
  counts_.assign(counts_.size(), 0);
  store_.begin_step(0);
}

StepContext ModelRunner::context(Flight& flight) {
  const ModelConfig& config = model_.config();
  const StepSums sums{
      Tensor(&sums_[0], DType::f64, {1}), Tensor(&sums_[1], DType::f64, {1}),
      Tensor(&sums_[2], DType::f64, {1}),
      Tensor(counts_.data(), DType::i64, {model_.num_moe_layers(), config.n_routed_experts})};
  return {.ops = backend_.ops(),
          .stream = *stream_,
          .dist = dist_context_,
          .batch = flight.batch(),
          .arena = arenas_for(recompute_, flight.slot, scratch_),
          .dtype = dtype_,
          .scalars = &scalars_,
          .sums = sums,
          .balance_factor = config.aux_loss_alpha / static_cast<double>(flight.batch().sequences),
          .routing_hook = nullptr,
          .training = true,
          .recompute = recompute_,
          .recomputing = false,
          .token_loss_T = {},
          .dry = false};
}

void ModelRunner::forward(Flight& flight, const Tensor& x_in_TD) {
  StepContext ctx = context(flight);
  model_.forward(ctx, flight.state, x_in_TD);
}

void ModelRunner::backward(Flight& flight, const Tensor& dx_out_TD, const Tensor& dx_in_TD) {
  StepContext ctx = context(flight);
  model_.backward(ctx, flight.state, dx_out_TD, dx_in_TD);
  flight.slot.reset();
}

}  // namespace dstrain::test
