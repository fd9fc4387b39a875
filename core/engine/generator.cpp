#include "core/engine/generator.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/engine/parameter_io.h"

namespace dstrain {
namespace {

constexpr int64_t kChunkTokens = 64;

}  // namespace

KeysValues CachedKvExchange::own(DistStream dist, int layer, const Tensor& k_TGQ,
                                 const Tensor& v_TGW, const AttentionSegments& local) {
  if (dist.dry) return {k_TGQ, v_TGW, local};
  const size_t index = static_cast<size_t>(layer);
  if (layers_.size() <= index) layers_.resize(index + 1);
  auto append = [&](DeviceMemory& memory, const Tensor& x) {
    const int64_t row_bytes = x.row_numel() * dtype_bytes(x.dtype());
    if (!memory.data()) memory = DeviceMemory(backend_, context_ * row_bytes, MemoryKind::device);
    backend_.copy(dist.stream, static_cast<char*>(memory.data()) + past_ * row_bytes, x.raw(),
                  x.bytes());
    return Tensor(memory.data(), x.dtype(), {past_ + x.size(0), x.size(1), x.size(2)});
  };
  const Tensor k_UGQ = append(layers_[index].k, k_TGQ), v_UGW = append(layers_[index].v, v_TGW);
  return {k_UGQ, v_UGW, segments_};
}

Generator::Generator(Backend& backend, DeepSeekModel& model, int64_t context, DType dtype)
    : backend_(backend),
      model_(model),
      context_(context),
      dtype_(dtype),
      stream_(backend.make_stream()),
      kv_(backend, context),
      params_(model.parameters()),
      dist_{tensor_, dispatcher_, kv_, sequences_, params_},
      slot_("activations"),
      scratch_("scratch"),
      inputs_("inputs"),
      state_(model.make_state()) {
  const int64_t chunk = std::min(kChunkTokens, context_);
  auto make_inputs = [&] {
    batch_.tokens_T = inputs_.make(DType::i32, {chunk}, "tokens");
    batch_.positions_T = inputs_.make(DType::i32, {chunk}, "positions");
    table_14_ = inputs_.make(DType::i32, {1, 4}, "segments");
    count_1_ = inputs_.make(DType::i32, {1}, "segment count");
    logits_1V_ = inputs_.make(dtype_, {1, model_.config().vocab_size}, "logits");
  };
  make_inputs();
  batch_.sequences = 1;
  batch_.tokens_per_sequence = batch_.sequence_length = chunk;
  batch_.segments = {table_14_, count_1_, chunk, context_};
  StepContext ctx = step_context(backend_.planning_ops(), *stream_);
  model_.forward(ctx, state_);
  model_.logits(ctx, state_, 0, 1, logits_1V_);
  auto real = [&](Arena& arena, DeviceMemory& memory) {
    memory = DeviceMemory(backend_, std::max<int64_t>(arena.peak(), Arena::kAlignment),
                          MemoryKind::device);
    arena = Arena(arena.name(), memory.data(), memory.bytes());
  };
  real(slot_, slot_memory_);
  real(scratch_, scratch_memory_);
  real(inputs_, input_memory_);
  make_inputs();
}

StepContext Generator::step_context(Ops& ops, Stream& stream) {
  return StepContext{.ops = ops,
                     .stream = stream,
                     .dist = dist_,
                     .batch = batch_,
                     .arena = arenas_for(Recompute::full, slot_, scratch_),
                     .dtype = dtype_,
                     .scalars = nullptr,
                     .sums = {},
                     .balance_factor = 0,
                     .routing_hook = nullptr,
                     .training = false,
                     .recompute = Recompute::full,
                     .recomputing = false,
                     .token_loss_T = {},
                     .dry = &ops != &backend_.ops()};
}

const std::vector<float>& Generator::feed(std::span<const int32_t> tokens) {
  DSTRAIN_CHECK(!tokens.empty() && position_ + std::ssize(tokens) <= context_,
                "tokens beyond the context that was planned");
  while (!tokens.empty()) {
    const size_t count =
        std::min(tokens.size(), static_cast<size_t>(std::min(kChunkTokens, context_)));
    feed_chunk(tokens.first(count));
    tokens = tokens.subspan(count);
  }
  return logits_;
}

void Generator::feed_chunk(std::span<const int32_t> tokens) {
  const int64_t T = std::ssize(tokens);
  std::vector<int32_t> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), static_cast<int32_t>(position_));
  const int32_t total = static_cast<int32_t>(position_ + T);
  const int32_t row[4] = {0, static_cast<int32_t>(T), 0, total}, one = 1;
  const Tensor all_tokens = batch_.tokens_T, all_positions = batch_.positions_T;
  batch_.tokens_T = all_tokens.rows(0, T);
  batch_.positions_T = all_positions.rows(0, T);
  batch_.tokens_per_sequence = batch_.sequence_length = T;
  backend_.copy(*stream_, batch_.tokens_T.raw(), tokens.data(), batch_.tokens_T.bytes());
  backend_.copy(*stream_, batch_.positions_T.raw(), positions.data(), batch_.positions_T.bytes());
  backend_.copy(*stream_, table_14_.raw(), row, sizeof row);
  backend_.copy(*stream_, count_1_.raw(), &one, sizeof one);
  batch_.segments = {table_14_, count_1_, T, total};
  kv_.set_position(position_, batch_.segments);

  StepContext ctx = step_context(backend_.ops(), *stream_);
  model_.forward(ctx, state_);
  model_.logits(ctx, state_, T - 1, T, logits_1V_);
  slot_.reset();
  logits_ =
      read_tensor(backend_, *stream_, logits_1V_);  // waits, so the host copies above are done
  batch_.tokens_T = all_tokens;
  batch_.positions_T = all_positions;
  position_ += T;
}

int32_t sample_token(std::span<const float> logits, const SamplingOptions& options, double u) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  auto better = [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  };
  if (options.temperature <= 0) return *std::min_element(order.begin(), order.end(), better);
  size_t count = order.size();
  if (options.top_k > 0) count = std::min(count, static_cast<size_t>(options.top_k));
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                    better);
  std::vector<double> weight(count);
  const double largest = logits[static_cast<size_t>(order[0])];
  for (size_t i = 0; i < count; ++i)
    weight[i] = std::exp((logits[static_cast<size_t>(order[i])] - largest) / options.temperature);
  const double all = std::accumulate(weight.begin(), weight.end(), 0.0);
  double kept = 0;
  size_t used = 0;
  while (used < count && (used == 0 || kept < options.top_p * all)) kept += weight[used++];
  double target = u * kept;
  for (size_t i = 0; i + 1 < used; ++i) {
    if (target < weight[i]) return order[i];
    target -= weight[i];
  }
  return order[used - 1];
}

}  // namespace dstrain
