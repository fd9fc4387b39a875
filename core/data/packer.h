// Packing documents into samples of seq_len tokens.
//
// One epoch of a source: its documents in a random order (or in file order) form one stream of
// tokens, cut every seq_len tokens; the samples are then taken in another random order. Each token
// is an input of exactly one sample of the epoch; the last sample of the stream is padded.
//
//   target of a token   the next token of its document, -1 at the document's last token. A document
//                       that goes on in the next sample lends its next token as the last target.
//   position            counts from 0 at the start of each document inside the sample
//   segment             the part of one document inside the sample: attention stays inside it
//
// Without document_mask the stream is plain text: targets cross documents, positions run through
// the sample, and the sample is one segment. Pads are a segment of their own with targets -1.
#pragma once

#include <cstdint>
#include <vector>

#include "core/data/permutation.h"
#include "core/data/token_dataset.h"

namespace dstrain {

struct PackOptions {
  int64_t seq_len = 0;  // T, at least 1
  bool document_mask = true;
  bool shuffle = true;
  uint64_t seed = 0;
};

// Consecutive tokens of one document.
struct Piece {
  int64_t begin = 0;  // token index in the dataset
  int64_t count = 0;
  bool ends_document = false;
};

// The order of one epoch: a pure function of (options, dataset, source, epoch). Takes half a byte
// of memory per document. Immutable; refers to the dataset, which must outlive it.
class EpochOrder {
 public:
  // source: the dataset's place among the sources of the run.
  EpochOrder(const TokenDataset& dataset, const PackOptions& options, int64_t source,
             int64_t epoch);

  // The same in every epoch: ceil(tokens / seq_len).
  int64_t num_samples() const { return num_samples(*dataset_, options_); }
  static int64_t num_samples(const TokenDataset& dataset, const PackOptions& options) {
    return (dataset.num_tokens() + options.seq_len - 1) / options.seq_len;
  }

  // Targets other than -1 in sample k, without reading a token.
  int64_t valid_targets(int64_t k) const;
  // Where the inputs of sample k lie, and behind them the next token of the stream if there is one.
  void pieces(int64_t k, std::vector<Piece>& out) const;
  // Tokens of sample k that are no pads.
  int64_t num_inputs(int64_t k) const;

 private:
  int64_t stream_begin(int64_t k) const;  // place in the token stream where sample k starts
  int64_t document(int64_t i) const { return options_.shuffle ? documents_(i) : i; }
  template <class Visit>
  void visit(int64_t begin, int64_t count, Visit&& visit_piece) const;

  const TokenDataset* dataset_;
  PackOptions options_;
  Permutation documents_, samples_;
  std::vector<int64_t> starts_;  // place in the stream of every kStride-th document
};

// Where a packed sequence goes: seq_len elements each.
struct SequenceRows {
  int32_t* tokens_T;
  int32_t* targets_T;
  int32_t* positions_T;
};

// Fills sequences; keeps its scratch memory from one to the next. One thread at a time.
class SequencePacker {
 public:
  explicit SequencePacker(const PackOptions& options)
      : options_(options), stream_(static_cast<size_t>(options.seq_len + 1)) {}

  // Writes sample k and appends the length of each of its segments, in order, to segment_lengths.
  // DataError naming file and offset for an id outside [0, vocab_size) or a damaged file.
  void pack(const TokenDataset& dataset, const EpochOrder& order, int64_t k, int64_t vocab_size,
            const SequenceRows& rows, std::vector<int32_t>& segment_lengths);
  // Writes a sequence of pads only.
  void pack_empty(const SequenceRows& rows, std::vector<int32_t>& segment_lengths) const;

 private:
  void pad(int64_t from, const SequenceRows& rows, std::vector<int32_t>& segment_lengths) const;

  PackOptions options_;
  std::vector<int32_t> stream_;  // the inputs and the token behind them
  std::vector<Piece> pieces_;
};

}  // namespace dstrain
