#include "core/engine/batch_slot.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace dstrain {

BatchSlot::BatchSlot(int64_t sequences, int64_t sequence_length, int64_t targets, const AxisPlace& context)
    : pieces_(pieces_of(sequence_length, context)) {
  batch_.sequences = sequences;
  batch_.sequence_length = sequence_length;
  batch_.tokens_per_sequence = sequence_length / context.size;
  targets_.resize(static_cast<size_t>(targets));
}

void BatchSlot::make_device(Arena& arena) {
  const int64_t T = batch_.num_tokens();
  batch_.tokens_T = arena.make(DType::i32, {T}, "tokens");
  batch_.positions_T = arena.make(DType::i32, {T}, "positions");
  for (Tensor& target : targets_) target = arena.make(DType::i32, {T}, "targets");
  batch_.segments.table_N4 = arena.make(DType::i32, {T, 4}, "segments");
  batch_.segments.count_1 = arena.make(DType::i32, {1}, "segment count");
}

void BatchSlot::make_host(Arena& arena) {
  const int64_t T = batch_.num_tokens(), whole = batch_.sequences * batch_.sequence_length;
  rows_XT_ = arena.make(DType::i32, {2 + std::ssize(targets_), T}, "tokens, positions, targets");
  whole_2T_ = arena.make(DType::i32, {2, whole}, "targets of whole sequences");
  table_N4_ = arena.make(DType::i32, {T + 1, 4}, "segments");
}

void BatchSlot::load(Backend& backend, Stream& stream, const HostBatch& batch) {
  const int64_t T = batch_.num_tokens();
  DSTRAIN_CHECK(batch.sequences == batch_.sequences && batch.tokens_per_sequence == batch_.sequence_length,
                "the micro-batch does not fit the engine's shape");
  if (staging_in_use_) staged_->synchronize();
  auto row = [&](int64_t i) { return rows_XT_.rows(i, i + 1).data<int32_t>(); };
  auto upload = [&](const Tensor& device, const void* host, int64_t bytes) {
    backend.copy(stream, device.raw(), host, bytes);
  };
  stage_rows(batch.tokens_T, row(0));
  stage_rows(batch.positions_T, row(1));
  stage_segments(batch);
  upload(batch_.tokens_T, row(0), 4 * T);
  upload(batch_.positions_T, row(1), 4 * T);
  const int32_t* count = table_N4_.data<int32_t>() + 4 * T;
  upload(batch_.segments.table_N4, table_N4_.raw(), 16 * int64_t{*count});
  upload(batch_.segments.count_1, count, 4);
  batch_.targets.clear();
  if (batch.targets_T) {
    stage_targets(batch);
    for (size_t k = 0; k < targets_.size(); ++k)
      upload(targets_[k], row(2 + static_cast<int64_t>(k)), 4 * T);
    batch_.targets = targets_;
  }
  staged_->record(stream);
  staging_in_use_ = true;
}

void BatchSlot::assume_largest() {
  batch_.targets = targets_;
  batch_.segments.max_queries = batch_.tokens_per_sequence;
  batch_.segments.max_keys = batch_.sequence_length;
}

void BatchSlot::stage_rows(const int32_t* source_T, int32_t* rows) const {
  for (int64_t s = 0; s < batch_.sequences; ++s)
    for (const SequencePiece& piece : pieces_) {
      const int64_t n = piece.end - piece.begin;
      std::memcpy(rows, source_T + s * batch_.sequence_length + piece.begin,
                  static_cast<size_t>(n) * sizeof(int32_t));
      rows += n;
    }
}

// A document's tokens in a piece see the document's keys from its first to their own.
void BatchSlot::stage_segments(const HostBatch& batch) {
  const int64_t S = batch_.sequence_length;
  int32_t* const table = table_N4_.data<int32_t>();
  int64_t queries = 0, keys = 0, count = 0;
  for (int64_t i = 0; i < batch.num_segments; ++i) {
    const int64_t begin = batch.segment_offsets[i], end = batch.segment_offsets[i + 1];
    const int64_t sequence = begin / S, base = sequence * S;
    int64_t local = sequence * batch_.tokens_per_sequence;
    for (const SequencePiece& piece : pieces_) {
      const int64_t first = std::max(begin, base + piece.begin), last = std::min(end, base + piece.end);
      if (first < last) {
        const int64_t values[4] = {local + first - base - piece.begin, last - first, begin, last - begin};
        for (int64_t v = 0; v < 4; ++v) table[4 * count + v] = static_cast<int32_t>(values[v]);
        queries = std::max(queries, last - first);
        keys = std::max(keys, last - begin);
        ++count;
      }
      local += piece.end - piece.begin;
    }
  }
  table[4 * batch_.num_tokens()] = static_cast<int32_t>(count);
  AttentionSegments& segments = batch_.segments;
  segments.max_count = count;
  segments.uniform = pieces_.size() == 1 && count * queries == batch_.num_tokens();
  batch_.segments.max_queries = queries;
  batch_.segments.max_keys = keys;
}

// Target k of position t is target k - 1 of the position after it, inside the same segment.
void BatchSlot::stage_targets(const HostBatch& batch) {
  const int64_t whole = whole_2T_.size(1);
  int32_t* depth = whole_2T_.data<int32_t>();
  int32_t* next = depth + whole;
  std::memcpy(depth, batch.targets_T, static_cast<size_t>(whole) * sizeof(int32_t));
  for (int64_t k = 0; k < std::ssize(targets_); ++k) {
    stage_rows(depth, rows_XT_.rows(2 + k, 3 + k).data<int32_t>());
    for (int64_t s = 0; s < batch.num_segments; ++s) {
      const int64_t begin = batch.segment_offsets[s], end = batch.segment_offsets[s + 1];
      for (int64_t t = begin; t < end; ++t) next[t] = t + 1 < end ? depth[t + 1] : -1;
    }
    std::swap(depth, next);
  }
}

}  // namespace dstrain
