// The input of one micro-batch on the device, with its staging in host memory: this rank's share of
// the sequences, targets of all depths, and the attention segments over its own keys and those of
// its peers.
#pragma once

#include <memory>
#include <vector>

#include "core/backend/backend.h"
#include "core/dist/sequence_pieces.h"
#include "core/layers/step_context.h"

namespace dstrain {

// A micro-batch in host memory. T = sequences * tokens_per_sequence, whole sequences.
struct HostBatch {
  int64_t sequences = 0, tokens_per_sequence = 0;
  const int32_t* tokens_T = nullptr;
  const int32_t* positions_T = nullptr;
  const int32_t* targets_T = nullptr;  // below 0: ignored; null: no loss
  // Attention segments: rows [offsets[i], offsets[i + 1]), all within a sequence.
  const int32_t* segment_offsets = nullptr;
  int64_t num_segments = 0;
};

class BatchSlot {
 public:
  // targets: 1 + prediction depth. sequence_length divides by 2 * context.size (if that is not 1).
  BatchSlot(int64_t sequences, int64_t sequence_length, int64_t targets, const AxisPlace& context);

  void make_device(Arena& arena);
  void make_host(Arena& arena);
  // Before the first load, once memory is there.
  void prepare(Backend& backend) { staged_ = backend.make_event(); }
  // Copies what it needs before it returns, and waits only if the staging is still on its way to
  // the device.
  void load(Backend& backend, Stream& stream, const HostBatch& batch);
  const Batch& batch() const { return batch_; }
  // For planning: a batch with targets, and the largest segments.
  void assume_largest();

 private:
  using Pieces = std::vector<SequencePiece>;
  // A run of a rank's rows.
  struct Rows {
    int64_t begin = 0, count = 0;
  };
  // Those of pieces from `first` on with tokens of the document: neighbours.
  Rows rows_of(const Pieces& pieces, size_t first, int64_t document_begin,
               int64_t document_end) const;
  void stage_rows(const Pieces& pieces, const int32_t* source_T, int32_t* rows) const;
  void stage_segments(const HostBatch& batch);
  bool is_lower(int peer) const {
    return !sees_both_pieces(context_.rank, peer_of(context_, peer));
  }
  void set_largest(int peer, int64_t count);
  void stage_peer(const HostBatch& batch, int peer);
  void stage_targets(const HostBatch& batch);

  AxisPlace context_;
  Pieces pieces_;
  std::vector<Pieces> peer_pieces_;  // that are seen
  Batch batch_;
  std::vector<Tensor> targets_;
  // Host: tokens, positions and targets in a row each; whole sequences of targets; the segment
  // table and after it its count. Of each peer positions, and segments with their count.
  Tensor rows_XT_, whole_2T_, table_N4_, peer_positions_PT_, peer_table_PX_;
  std::unique_ptr<Event> staged_;
  bool staging_in_use_ = false;
};

}  // namespace dstrain
