// Documents to token ids on worker threads, results in input order.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "core/data/text_source.h"

namespace dstrain {

// The ids of one TextBlock.
struct EncodedBlock {
  std::vector<int32_t> ids;             // document after document
  std::vector<int64_t> document_sizes;  // in ids, each at least 1
  int64_t text_bytes = 0;
  int64_t empty_documents = 0;
  int64_t replaced_sequences = 0;
  int64_t unknown_bytes = 0;
  int64_t input = 0;
  std::optional<uint64_t> input_hash;
  TextPosition after;
};

class EncodePipeline {
 public:
  using Encode = std::function<EncodedBlock(const TextBlock&)>;

  // One worker thread per encoder, which only that thread calls.
  EncodePipeline(TextSource source, std::vector<Encode> encoders);
  ~EncodePipeline();  // stops the threads, at the latest when each has finished its block
  EncodePipeline(const EncodePipeline&) = delete;
  EncodePipeline& operator=(const EncodePipeline&) = delete;

  // The next block in order; false after the last. Rethrows what reading or encoding it threw.
  bool next(EncodedBlock& block);

 private:
  struct Job {
    TextBlock text;
    EncodedBlock encoded;
    int64_t text_bytes = 0;
    bool done = false;
    std::exception_ptr error;
  };

  void read();
  void work(const Encode& encode);
  bool has_room() const;

  TextSource source_;  // the reader's
  std::vector<Encode> encoders_;
  int64_t max_jobs_;

  std::mutex mutex_;  // over the members below
  std::condition_variable room_, work_, done_;
  std::deque<std::unique_ptr<Job>> jobs_;  // in order, the next result first
  std::deque<Job*> waiting_;               // those that no worker has taken
  int64_t bytes_in_flight_ = 0;
  bool stop_ = false, at_end_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace dstrain
