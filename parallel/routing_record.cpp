#include "parallel/routing_record.h"

#include <algorithm>
#include <cmath>

#include "core/dist/sequence_pieces.h"

namespace dstrain {

int32_t* RoutingRecord::token(int64_t step, int moe_index, int64_t sequence, int64_t position) {
  std::unique_lock lock(mutex_);
  std::vector<int32_t>& layer = layers_[{step, moe_index}];
  if (layer.empty()) layer.resize(static_cast<size_t>(sequences_ * length_ * choices_), -1);
  lock.unlock();
  return layer.data() + (sequence * length_ + position) * choices_;
}

RoutingTap::RoutingTap(const Config& config, const RankPlace& place, RoutingRecord& record,
                       bool replay, Backend& backend)
    : config_(config), place_(place), record_(record), replay_(replay), backend_(backend) {}

template <class T>
std::vector<T> RoutingTap::download(Stream& stream, const Tensor& x) const {
  DSTRAIN_CHECK(!x.defined() || (x.dtype() == DTypeOf<T>::value && x.contiguous()),
                "the tap cannot read " + x.describe());
  std::vector<T> host(static_cast<size_t>(x.numel()));
  backend_.copy(stream, host.data(), x.raw(), x.bytes());
  stream.synchronize();
  return host;
}

int32_t* RoutingTap::token(int moe_index, int64_t t, int64_t tokens) const {
  const int64_t per_sequence = config_.data.seq_len / place_.context.size;
  const int64_t row = place_.tensor.rank * tokens + t;
  const int64_t sequence =
      (micro_batch_ * place_.data.size + place_.data.rank) * config_.train.micro_batch + row / per_sequence;
  int64_t position = row % per_sequence;
  for (const SequencePiece& piece : pieces_of(config_.data.seq_len, place_.context)) {
    const int64_t length = piece.end - piece.begin;
    if (position < length) {
      position += piece.begin;
      break;
    }
    position -= length;
  }
  return record_.token(step_, moe_index, sequence, position);
}

Tensor RoutingTap::recorded(DistStream dist, int moe_index, int64_t tokens) {
  if (!replay_) return {};
  const int64_t K = record_.choices();
  std::vector<int32_t> rows(static_cast<size_t>(tokens * K));
  for (int64_t t = 0; t < tokens; ++t) std::copy_n(token(moe_index, t, tokens), K, rows.begin() + t * K);
  const int64_t bytes = tokens * K * dtype_bytes(DType::i32);
  DeviceMemory& memory = rows_[{micro_batch_, moe_index}];
  if (memory.bytes() != bytes) memory = DeviceMemory(backend_, bytes, MemoryKind::device);
  backend_.copy(dist.stream, memory.data(), rows.data(), bytes);
  dist.stream.synchronize();
  return Tensor(memory.data(), DType::i32, {tokens, K});
}

void RoutingTap::chosen(DistStream dist, int moe_index, const Tensor& scores_tE,
                        const Tensor& bias_E, const Tensor& indices_tK) {
  const int64_t T = indices_tK.size(0), K = indices_tK.size(1), E = scores_tE.size(1);
  const std::vector<int32_t> all_indices = download<int32_t>(dist.stream, indices_tK);
  std::vector<float> scores, bias;
  if (replay_) {
    scores = download<float>(dist.stream, scores_tE);
    bias = download<float>(dist.stream, bias_E);
  }
  for (int64_t t = 0; t < T; ++t) {
    const int32_t* indices = all_indices.data() + t * K;
    if (!replay_) {
      std::copy_n(indices, K, token(moe_index, t, T));
      continue;
    }
    const double difference =
        margin(scores.data() + t * E, bias.empty() ? nullptr : bias.data(), indices);
    flips_.tokens += difference > 0;
    flips_.widest_margin = std::max(flips_.widest_margin, difference);
  }
}

// Where a recorded expert's group was not kept, by the scores of groups; else by those of experts.
double RoutingTap::margin(const float* scores, const float* bias, const int32_t* indices) {
  const ModelConfig& model = config_.model;
  const int64_t E = model.n_routed_experts, K = record_.choices();
  const bool grouped = model.topk_method != TopkMethod::greedy && model.n_group > 1;
  const int64_t groups = grouped ? model.n_group : 1, size = E / groups;
  const bool best_two = model.topk_method == TopkMethod::noaux_tc && size > 1;
  auto value = [&](int64_t e) { return static_cast<double>(scores[e] + (bias ? bias[e] : 0.0f)); };
  auto best = [&](int64_t begin, int64_t end, int64_t count, auto&& keep) {
    order_.clear();
    for (int64_t e = begin; e < end; ++e)
      if (keep(e)) order_.emplace_back(-value(e), static_cast<int32_t>(e));
    std::sort(order_.begin(), order_.end());
    order_.resize(static_cast<size_t>(std::min(count, std::ssize(order_))));
  };
  group_scores_.clear();
  for (int64_t g = 0; g < groups; ++g) {
    best(g * size, (g + 1) * size, best_two ? 2 : 1, [](int64_t) { return true; });
    double sum = 0;
    for (const auto& [negative, e] : order_) sum -= negative;
    group_scores_.emplace_back(-sum, static_cast<int32_t>(g));
  }
  std::vector<std::pair<double, int32_t>>& ranked = group_scores_;
  std::sort(ranked.begin(), ranked.end());
  const size_t kept = static_cast<size_t>(grouped ? model.topk_group : 1);
  auto rank_of = [&](int64_t e) {
    for (size_t r = 0; r < ranked.size(); ++r)
      if (ranked[r].second == e / size) return r;
    return ranked.size();
  };
  double widest = 0;
  for (int64_t k = 0; k < K; ++k)
    if (const size_t r = rank_of(indices[k]); r >= kept)
      widest = std::max(widest, ranked[r].first - ranked[kept - 1].first);
  if (widest > 0) return widest;

  best(0, E, K, [&](int64_t e) { return rank_of(e) < kept; });
  auto is_recorded = [&](int32_t e) { return std::find(indices, indices + K, e) != indices + K; };
  double preferred = -INFINITY, taken = INFINITY;
  for (const auto& [negative, e] : order_)
    if (!is_recorded(e)) preferred = std::max(preferred, -negative);
  if (preferred == -INFINITY) return 0;
  for (int64_t k = 0; k < K; ++k) {
    const bool own = std::any_of(order_.begin(), order_.end(), [&](auto& o) { return o.second == indices[k]; });
    if (!own) taken = std::min(taken, value(indices[k]));
  }
  return std::max(preferred - taken, 1e-300);  // a difference counts, also one without a margin
}

}  // namespace dstrain
