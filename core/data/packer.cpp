#include "core/data/packer.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr int64_t kStride = 16;

uint64_t order_key(std::string_view what, uint64_t seed, int64_t source, int64_t epoch) {
  const uint64_t stream = stream_id(what.data(), what.size());
  const uint64_t of_source = random_u64(seed, stream, static_cast<uint64_t>(source));
  return random_u64(of_source, 0, static_cast<uint64_t>(epoch));
}

}  // namespace

EpochOrder::EpochOrder(const TokenDataset& dataset, const PackOptions& options, int64_t source,
                       int64_t epoch)
    : dataset_(&dataset),
      options_(options),
      documents_(dataset.num_documents(), order_key("document order", options.seed, source, epoch)),
      samples_(num_samples(), order_key("sample order", options.seed, source, epoch)) {
  const int64_t documents = dataset.num_documents();
  starts_.reserve(static_cast<size_t>((documents + kStride - 1) / kStride));
  for (int64_t i = 0, token = 0; i < documents; ++i) {
    if (i % kStride == 0) starts_.push_back(token);
    token += dataset.document_range(document(i)).count();
  }
}

int64_t EpochOrder::stream_begin(int64_t k) const {
  return (options_.shuffle ? samples_(k) : k) * options_.seq_len;
}

int64_t EpochOrder::num_inputs(int64_t k) const {
  return std::min(options_.seq_len, dataset_->num_tokens() - stream_begin(k));
}

// Calls visit_piece for the documents under places [begin, begin + count) of the stream.
template <class Visit>
void EpochOrder::visit(int64_t begin, int64_t count, Visit&& visit_piece) const {
  const auto after = std::upper_bound(starts_.begin(), starts_.end(), begin);
  int64_t i = (after - starts_.begin() - 1) * kStride;
  int64_t place = *std::prev(after);  // where document i starts
  for (const int64_t end = begin + count; place < end; ++i) {
    const TokenRange range = dataset_->document_range(document(i));
    const int64_t from = std::max(begin, place), to = std::min(end, place + range.count());
    if (from < to)
      visit_piece(Piece{range.begin + (from - place), to - from, to == place + range.count()});
    place += range.count();
  }
}

int64_t EpochOrder::valid_targets(int64_t k) const {
  const int64_t begin = stream_begin(k), inputs = num_inputs(k);
  if (!options_.document_mask) return inputs - (begin + inputs == dataset_->num_tokens() ? 1 : 0);
  int64_t ends = 0;
  visit(begin, inputs, [&](const Piece& piece) { ends += piece.ends_document; });
  return inputs - ends;
}

void EpochOrder::pieces(int64_t k, std::vector<Piece>& out) const {
  const int64_t begin = stream_begin(k);
  out.clear();
  visit(begin, std::min(options_.seq_len + 1, dataset_->num_tokens() - begin),
        [&](const Piece& piece) { out.push_back(piece); });
}

void SequencePacker::pack(const TokenDataset& dataset, const EpochOrder& order, int64_t k,
                          int64_t vocab_size, const SequenceRows& rows,
                          std::vector<int32_t>& segment_lengths) {
  order.pieces(k, pieces_);
  const int64_t inputs = order.num_inputs(k);
  int64_t end = 0;
  for (const Piece& piece : pieces_) {
    dataset.read(piece.begin, piece.count, stream_.data() + end);
    check_token_ids(dataset, piece.begin, stream_.data() + end, piece.count, vocab_size);
    end += piece.count;
  }
  std::copy_n(stream_.begin(), inputs, rows.tokens_T);
  std::copy_n(stream_.begin() + 1, std::min(inputs, end - 1), rows.targets_T);
  if (end == inputs) rows.targets_T[inputs - 1] = -1;  // nothing follows in this epoch

  if (options_.document_mask) {
    int64_t t = 0;
    for (const Piece& piece : pieces_) {
      const int64_t count = std::min(piece.count, inputs - t);
      if (count == 0) break;  // the piece holds the token behind the inputs only
      for (int64_t i = 0; i < count; ++i) rows.positions_T[t + i] = static_cast<int32_t>(i);
      t += count;
      if (piece.ends_document && count == piece.count) rows.targets_T[t - 1] = -1;
      segment_lengths.push_back(static_cast<int32_t>(count));
    }
  } else {
    for (int64_t t = 0; t < inputs; ++t) rows.positions_T[t] = static_cast<int32_t>(t);
    segment_lengths.push_back(static_cast<int32_t>(inputs));
  }
  pad(inputs, rows, segment_lengths);
}

void SequencePacker::pack_empty(const SequenceRows& rows,
                                std::vector<int32_t>& segment_lengths) const {
  pad(0, rows, segment_lengths);
}

void SequencePacker::pad(int64_t from, const SequenceRows& rows,
                         std::vector<int32_t>& segment_lengths) const {
  if (from == options_.seq_len) return;
  for (int64_t t = from; t < options_.seq_len; ++t) {
    rows.tokens_T[t] = 0;
    rows.targets_T[t] = -1;
    rows.positions_T[t] = static_cast<int32_t>(t - from);
  }
  segment_lengths.push_back(static_cast<int32_t>(options_.seq_len - from));
}

}  // namespace dstrain
