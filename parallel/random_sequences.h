// Sequences of random tokens in documents of random length, for runs that need no dataset: each is
// a function of the seed and its number alone.
#pragma once

#include <cstdint>
#include <vector>

#include "core/config/config.h"
#include "core/engine/batch_slot.h"

namespace dstrain {

// Whole sequences in host memory. T = sequences * length.
struct SequenceBatch {
  int64_t sequences = 0, length = 0;
  std::vector<int32_t> tokens_T, positions_T, targets_T;
  std::vector<int32_t> segment_offsets;  // documents, and one past the last

  // Holds as long as the batch and its vectors stay where they are.
  HostBatch view() const;
  int64_t valid_tokens() const;  // with a target
};

class RandomSequences {
 public:
  explicit RandomSequences(const Config& config)
      : seed_(static_cast<uint64_t>(config.run.seed)),
        vocab_(static_cast<uint64_t>(config.model.vocab_size)),
        length_(config.data.seq_len) {}

  // Sequences first .. first + count - 1.
  SequenceBatch batch(int64_t first, int64_t count) const;

 private:
  void append(uint64_t sequence, SequenceBatch& batch) const;

  uint64_t seed_, vocab_;
  int64_t length_;
};

}  // namespace dstrain
