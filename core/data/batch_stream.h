// Micro-batches for one data-parallel rank, prepared by a reader thread ahead of their use.
//
// Step s takes the global_batch samples that follow in the SampleOrder; row j of micro-batch m of
// data-parallel rank r is the one at place m * dp_size * micro_batch + r * micro_batch + j of the
// step. Which samples a step holds does not depend on the layout.
//
// The reader fills a ring of slots in memory that the caller provides (and may have pinned). With n
// slots, up to n micro-batches are ready or handed out. All functions belong to one thread, the
// consumer's.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "core/data/sample_order.h"

namespace dstrain {

struct BatchStreamOptions {
  PackOptions pack;
  int64_t vocab_size = 0;    // of the model; every token id is checked against it
  int64_t micro_batch = 1;   // sequences
  int64_t global_batch = 1;  // sequences; a multiple of micro_batch * dp_size
  int64_t dp_rank = 0, dp_size = 1;
  bool single_pass = false;   // evaluation: each sample once; the last step is filled up with pads
  int64_t start = 0;          // a cursor()
  std::vector<int64_t> skip;  // sample ids that are left out
};

// T = sequences * seq_len tokens, sequence after sequence. Lies in a slot until it is released.
struct HostMicroBatch {
  int64_t step = 0;         // counts from 0 where the stream started
  int64_t micro_batch = 0;  // within the step
  bool last_of_step = false;
  int64_t sequences = 0, seq_len = 0;
  const int32_t* tokens_T = nullptr;
  const int32_t* targets_T = nullptr;    // -1: no loss here
  const int32_t* positions_T = nullptr;  // restart at 0 in each segment
  const int32_t* segment_offsets =
      nullptr;               // num_segments + 1 ascending offsets from 0 to T; room for T + 1
  int64_t num_segments = 0;  // a segment never crosses a sequence
  int64_t max_segment_len = 0;
  const int64_t* sample_ids = nullptr;  // one per sequence; -1: a sequence of pads
  int64_t valid_tokens = 0;             // targets other than -1, here
  int64_t step_valid_tokens = 0;        // and in the whole global batch, over all ranks
};

class BatchStream {
 public:
  static constexpr int64_t kSlotAlignment = 64;

  // Bytes of one slot, a multiple of kSlotAlignment.
  static int64_t slot_bytes(int64_t micro_batch, int64_t seq_len);

  // memory: aligned to kSlotAlignment, room for one slot at least; it must outlive the stream, as
  // must the datasets. Starts the reader thread. DataError if a source is too short.
  BatchStream(std::vector<BatchSource> sources, BatchStreamOptions options, void* memory,
              int64_t memory_bytes);
  ~BatchStream();  // stops the reader; references to micro-batches end here
  BatchStream(const BatchStream&) = delete;
  BatchStream& operator=(const BatchStream&) = delete;

  // The next micro-batch, waiting for it if need be. Rethrows what the reader met, at the place
  // where the micro-batch is missing. Not after the last step of a single pass, and not while every
  // slot is handed out.
  const HostMicroBatch& next();
  // Gives back the slot of the oldest micro-batch handed out.
  void release();

  // Where a resumed stream starts: behind the last step of which every micro-batch was released.
  int64_t cursor() const { return cursor_; }
  int64_t micro_batches_per_step() const { return micro_batches_; }
  // Steps from `start` to the end of a single pass; -1 if there is no end.
  int64_t num_steps() const;

 private:
  struct Slot {
    int32_t* tokens_T;
    int32_t* targets_T;
    int32_t* positions_T;
    int32_t* segment_offsets;
    int64_t* sample_ids;
    HostMicroBatch batch;
    int64_t cursor_after;  // of the step
  };

  Slot make_slot(char* memory) const;
  void read_steps();
  int64_t plan_step();
  void fill(Slot& slot, int64_t first_in_step);

  BatchStreamOptions options_;
  int64_t micro_batches_;
  SampleOrder order_;  // the reader's, with the three below
  SequencePacker packer_;
  std::vector<SampleRef> plan_;  // of the step being read
  std::vector<int32_t> segment_lengths_;
  std::vector<Slot> slots_;
  int64_t num_samples_;
  int64_t cursor_;

  std::mutex mutex_;  // over the members below
  std::condition_variable produced_changed_, released_changed_;
  int64_t produced_ = 0, handed_out_ = 0, released_ = 0;  // micro-batches so far
  bool stop_ = false, ended_ = false;
  std::exception_ptr error_;
  std::thread reader_;
};

}  // namespace dstrain
