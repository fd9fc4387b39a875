#include "core/engine/batch_slot.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace dstrain {
namespace {

void write_segment(int32_t* row, int64_t query, int64_t queries, int64_t key, int64_t keys) {
  row[0] = static_cast<int32_t>(query);
  row[1] = static_cast<int32_t>(queries);
  row[2] = static_cast<int32_t>(key);
  row[3] = static_cast<int32_t>(keys);
}

int64_t length_of(const std::vector<SequencePiece>& pieces) {
  int64_t length = 0;
  for (const SequencePiece& piece : pieces) length += piece.end - piece.begin;
  return length;
}

}  // namespace

BatchSlot::BatchSlot(int64_t sequences, int64_t sequence_length, int64_t targets,
                     const AxisPlace& context)
    : context_(context), pieces_(pieces_of(sequence_length, context)) {
  batch_.sequences = sequences;
  batch_.sequence_length = sequence_length;
  batch_.tokens_per_sequence = sequence_length / context.size;
  targets_.resize(static_cast<size_t>(targets));
  for (int i = 0; i < context.size - 1; ++i)
    peer_pieces_.push_back(pieces_seen(sequence_length, context, peer_of(context, i)));
  batch_.peers.resize(peer_pieces_.size());
}

void BatchSlot::make_device(Arena& arena) {
  const int64_t T = batch_.num_tokens();
  batch_.tokens_T = arena.make(DType::i32, {T}, "tokens");
  batch_.positions_T = arena.make(DType::i32, {T}, "positions");
  for (Tensor& target : targets_) target = arena.make(DType::i32, {T}, "targets");
  batch_.segments.table_N4 = arena.make(DType::i32, {T, 4}, "segments");
  batch_.segments.count_1 = arena.make(DType::i32, {1}, "segment count");
  for (size_t i = 0; i < batch_.peers.size(); ++i) {
    PeerTokens& peer = batch_.peers[i];
    peer.positions_T = arena.make(DType::i32, {batch_.sequences * length_of(peer_pieces_[i])},
                                  "positions of a peer");
    peer.segments.causal = false;
    peer.segments.table_N4 = arena.make(DType::i32, {batch_.sequences, 4}, "segments of a peer");
    peer.segments.count_1 = arena.make(DType::i32, {1}, "segment count of a peer");
  }
}

void BatchSlot::make_host(Arena& arena) {
  const int64_t T = batch_.num_tokens(), whole = batch_.sequences * batch_.sequence_length;
  const int64_t P = std::ssize(batch_.peers);
  rows_XT_ = arena.make(DType::i32, {2 + std::ssize(targets_), T}, "tokens, positions, targets");
  whole_2T_ = arena.make(DType::i32, {2, whole}, "targets of whole sequences");
  table_N4_ = arena.make(DType::i32, {T + 1, 4}, "segments");
  peer_positions_PT_ = arena.make(DType::i32, {P, T}, "positions of peers");
  peer_table_PX_ = arena.make(DType::i32, {P, 4 * batch_.sequences + 1}, "segments of peers");
}

void BatchSlot::load(Backend& backend, Stream& stream, const HostBatch& batch) {
  const int64_t T = batch_.num_tokens();
  DSTRAIN_CHECK(
      batch.sequences == batch_.sequences && batch.tokens_per_sequence == batch_.sequence_length,
      "the micro-batch does not fit the engine's shape");
  if (staging_in_use_) staged_->synchronize();
  auto row = [](const Tensor& rows, int64_t i) { return rows.rows(i, i + 1).data<int32_t>(); };
  auto upload = [&](const Tensor& device, const void* host, int64_t bytes) {
    backend.copy(stream, device.raw(), host, bytes);
  };
  auto upload_segments = [&](const AttentionSegments& segments, const int32_t* table,
                             const int32_t* count) {
    upload(segments.table_N4, table, 16 * int64_t{*count});
    upload(segments.count_1, count, 4);
  };
  stage_rows(pieces_, batch.tokens_T, row(rows_XT_, 0));
  stage_rows(pieces_, batch.positions_T, row(rows_XT_, 1));
  stage_segments(batch);
  upload(batch_.tokens_T, row(rows_XT_, 0), 4 * T);
  upload(batch_.positions_T, row(rows_XT_, 1), 4 * T);
  upload_segments(batch_.segments, table_N4_.data<int32_t>(), table_N4_.data<int32_t>() + 4 * T);
  for (int i = 0; i < static_cast<int>(std::ssize(batch_.peers)); ++i) {
    const PeerTokens& peer = batch_.peers[static_cast<size_t>(i)];
    stage_rows(peer_pieces_[static_cast<size_t>(i)], batch.positions_T, row(peer_positions_PT_, i));
    stage_peer(batch, i);
    upload(peer.positions_T, row(peer_positions_PT_, i), peer.positions_T.bytes());
    const int32_t* const table = row(peer_table_PX_, i);
    upload_segments(peer.segments, table, table + 4 * batch_.sequences);
  }
  batch_.targets.clear();
  if (batch.targets_T) {
    stage_targets(batch);
    for (size_t k = 0; k < targets_.size(); ++k)
      upload(targets_[k], row(rows_XT_, 2 + static_cast<int64_t>(k)), 4 * T);
    batch_.targets = targets_;
  }
  staged_->record(stream);
  staging_in_use_ = true;
}

void BatchSlot::assume_largest() {
  batch_.targets = targets_;
  batch_.segments.max_queries = batch_.segments.max_keys = batch_.tokens_per_sequence;
  for (int i = 0; i < static_cast<int>(std::ssize(batch_.peers)); ++i)
    set_largest(i, batch_.sequences);
}

// The same bounds for all batches but those without segments, so that a back end prepares itself
// once.
void BatchSlot::set_largest(int peer, int64_t count) {
  AttentionSegments& segments = batch_.peers[static_cast<size_t>(peer)].segments;
  const int64_t rows = count == 0 ? 0 : batch_.tokens_per_sequence;
  segments.max_queries = is_lower(peer) ? rows : rows / 2;
  segments.max_keys = is_lower(peer) ? rows / 2 : rows;
  segments.max_count = count;
}

void BatchSlot::stage_rows(const Pieces& pieces, const int32_t* source_T, int32_t* rows) const {
  for (int64_t s = 0; s < batch_.sequences; ++s)
    for (const SequencePiece& piece : pieces) {
      const int64_t n = piece.end - piece.begin;
      std::memcpy(rows, source_T + s * batch_.sequence_length + piece.begin,
                  static_cast<size_t>(n) * sizeof(int32_t));
      rows += n;
    }
}

// A document that reaches from one piece into the next goes through the end of the one and the
// beginning of the other, which are neighbours here.
BatchSlot::Rows BatchSlot::rows_of(const Pieces& pieces, size_t first, int64_t document_begin,
                                   int64_t document_end) const {
  const int64_t sequence = document_begin / batch_.sequence_length;
  const int64_t base = sequence * batch_.sequence_length;
  int64_t local = sequence * length_of(pieces);
  Rows rows;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const SequencePiece& piece = pieces[i];
    const int64_t begin = std::max(document_begin - base, piece.begin),
                  end = std::min(document_end - base, piece.end);
    if (i >= first && begin < end) {
      if (rows.count == 0) rows.begin = local + begin - piece.begin;
      rows.count += end - begin;
    }
    local += piece.end - piece.begin;
  }
  return rows;
}

void BatchSlot::stage_segments(const HostBatch& batch) {
  int32_t* const table = table_N4_.data<int32_t>();
  int64_t longest = 0, count = 0;
  for (int64_t i = 0; i < batch.num_segments; ++i) {
    const Rows rows = rows_of(pieces_, 0, batch.segment_offsets[i], batch.segment_offsets[i + 1]);
    if (rows.count == 0) continue;
    write_segment(table + 4 * count++, rows.begin, rows.count, rows.begin, rows.count);
    longest = std::max(longest, rows.count);
  }
  table[4 * batch_.num_tokens()] = static_cast<int32_t>(count);
  AttentionSegments& segments = batch_.segments;
  segments.max_count = count;
  segments.max_queries = segments.max_keys = longest;
  segments.uniform = count * longest == batch_.num_tokens();
}

// What core/dist/sequence_pieces.h says of pieces, within documents: of a sequence at most one is
// on both sides.
void BatchSlot::stage_peer(const HostBatch& batch, int peer) {
  const Pieces& theirs = peer_pieces_[static_cast<size_t>(peer)];
  int32_t* const table = peer_table_PX_.rows(peer, peer + 1).data<int32_t>();
  const size_t first = is_lower(peer) ? 0 : 1;  // piece whose queries see it
  int64_t count = 0;
  for (int64_t i = 0; i < batch.num_segments; ++i) {
    const int64_t begin = batch.segment_offsets[i], end = batch.segment_offsets[i + 1];
    const Rows queries = rows_of(pieces_, first, begin, end), keys = rows_of(theirs, 0, begin, end);
    if (queries.count == 0 || keys.count == 0) continue;
    write_segment(table + 4 * count++, queries.begin, queries.count, keys.begin, keys.count);
  }
  table[4 * batch_.sequences] = static_cast<int32_t>(count);
  set_largest(peer, count);
}

// Target k of position t is target k - 1 of the position after it, inside the same segment.
void BatchSlot::stage_targets(const HostBatch& batch) {
  const int64_t whole = whole_2T_.size(1);
  int32_t* depth = whole_2T_.data<int32_t>();
  int32_t* next = depth + whole;
  std::memcpy(depth, batch.targets_T, static_cast<size_t>(whole) * sizeof(int32_t));
  for (int64_t k = 0; k < std::ssize(targets_); ++k) {
    stage_rows(pieces_, depth, rows_XT_.rows(2 + k, 3 + k).data<int32_t>());
    for (int64_t s = 0; s < batch.num_segments; ++s) {
      const int64_t begin = batch.segment_offsets[s], end = batch.segment_offsets[s + 1];
      for (int64_t t = begin; t < end; ++t) next[t] = t + 1 < end ? depth[t + 1] : -1;
    }
    std::swap(depth, next);
  }
}

}  // namespace dstrain
