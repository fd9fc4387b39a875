#include "parallel/routing_record.h"

#include <algorithm>
#include <span>

#include "core/dist/sequence_pieces.h"
#include "parallel/routing_margin.h"

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
    const double difference = routing_margin(
        config_.model, std::span(scores).subspan(static_cast<size_t>(t * E), static_cast<size_t>(E)),
        bias, {indices, static_cast<size_t>(K)});
    flips_.tokens += difference > 0;
    flips_.widest_margin = std::max(flips_.widest_margin, difference);
  }
}

}  // namespace dstrain
