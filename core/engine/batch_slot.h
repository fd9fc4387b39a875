// The input of one micro-batch on the device, with its staging in host memory: this rank's share of the
// sequences, targets of all depths, and the attention segments over keys of whole sequences.
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
  // Copies what it needs before it returns, and waits only if the staging is still on its way to the device.
  void load(Backend& backend, Stream& stream, const HostBatch& batch);
  const Batch& batch() const { return batch_; }
  // For planning: a batch with targets, and the largest segments.
  void assume_largest();

 private:
  void stage_rows(const int32_t* source_T, int32_t* rows) const;
  void stage_segments(const HostBatch& batch);
  void stage_targets(const HostBatch& batch);

  std::vector<SequencePiece> pieces_;
  Batch batch_;
  std::vector<Tensor> targets_;
  // Host: tokens, positions and targets in a row each; whole sequences of targets; the segment table.
  Tensor rows_XT_, whole_2T_, table_N4_;
  std::unique_ptr<Event> staged_;
  bool staging_in_use_ = false;
};

}  // namespace dstrain
