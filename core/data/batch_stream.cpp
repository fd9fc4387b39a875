#include "core/data/batch_stream.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "core/base/error.h"

namespace dstrain {
namespace {

int64_t aligned(int64_t bytes) {
  const int64_t a = BatchStream::kSlotAlignment;
  return (bytes + a - 1) / a * a;
}

BatchStreamOptions checked(BatchStreamOptions o) {
  DSTRAIN_CHECK(o.dp_size >= 1 && o.dp_rank >= 0 && o.dp_rank < o.dp_size && o.micro_batch >= 1 &&
                    o.global_batch >= 1 && o.global_batch % (o.micro_batch * o.dp_size) == 0,
                fmt::format("a global batch of {} does not divide over {} ranks by micro-batches "
                            "of {}",
                            o.global_batch, o.dp_size, o.micro_batch));
  DSTRAIN_CHECK(o.pack.seq_len >= 1 && o.micro_batch * o.pack.seq_len < (int64_t{1} << 31),
                "a micro-batch has 1 to 2^31 - 1 tokens");
  return o;
}

}  // namespace

int64_t BatchStream::slot_bytes(int64_t micro_batch, int64_t seq_len) {
  const int64_t tokens = micro_batch * seq_len;
  return 3 * aligned(tokens * 4) + aligned((tokens + 1) * 4) + aligned(micro_batch * 8);
}

BatchStream::Slot BatchStream::make_slot(char* memory) const {
  const int64_t tokens = options_.micro_batch * options_.pack.seq_len;
  Slot slot{};
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory);
    memory += aligned(count * static_cast<int64_t>(sizeof *array));
  };
  take(slot.tokens_T, tokens);
  take(slot.targets_T, tokens);
  take(slot.positions_T, tokens);
  take(slot.segment_offsets, tokens + 1);
  take(slot.sample_ids, options_.micro_batch);
  return slot;
}

BatchStream::BatchStream(std::vector<BatchSource> sources, BatchStreamOptions options, void* memory,
                         int64_t memory_bytes)
    : options_(checked(std::move(options))),
      micro_batches_(options_.global_batch / (options_.micro_batch * options_.dp_size)),
      order_(std::move(sources), options_.pack, options_.single_pass, options_.start,
             options_.skip),
      packer_(options_.pack),
      plan_(static_cast<size_t>(options_.global_batch)),
      num_samples_(order_.num_samples()),
      cursor_(options_.start) {
  const BatchStreamOptions& o = options_;
  const int64_t bytes = slot_bytes(o.micro_batch, o.pack.seq_len);
  DSTRAIN_CHECK(memory_bytes >= bytes && reinterpret_cast<uintptr_t>(memory) % kSlotAlignment == 0,
                fmt::format("{} bytes of memory for slots of {} bytes", memory_bytes, bytes));
  for (int64_t s = 0; s < memory_bytes / bytes; ++s)
    slots_.push_back(make_slot(static_cast<char*>(memory) + s * bytes));
  reader_ = std::thread([this] { read_steps(); });
}

BatchStream::~BatchStream() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  released_changed_.notify_all();
  reader_.join();
}

int64_t BatchStream::num_steps() const {
  if (num_samples_ < 0) return -1;
  // Skipped samples shorten a pass.
  int64_t left = std::max<int64_t>(num_samples_ - options_.start, 0);
  std::vector<int64_t> skip = options_.skip;
  std::sort(skip.begin(), skip.end());
  skip.erase(std::unique(skip.begin(), skip.end()), skip.end());
  for (int64_t id : skip) left -= id >= options_.start && id < num_samples_;
  return (left + options_.global_batch - 1) / options_.global_batch;
}

// The reader thread.
void BatchStream::read_steps() {
  try {
    const int64_t steps = num_steps();
    for (int64_t step = 0; steps < 0 || step < steps; ++step) {
      const int64_t step_valid_tokens = plan_step();
      for (int64_t m = 0; m < micro_batches_; ++m) {
        std::unique_lock lock(mutex_);
        released_changed_.wait(lock,
                               [&] { return stop_ || produced_ - released_ < std::ssize(slots_); });
        if (stop_) return;
        Slot& slot = slots_[produced_ % std::ssize(slots_)];
        lock.unlock();

        fill(slot, (m * options_.dp_size + options_.dp_rank) * options_.micro_batch);
        slot.batch.step = step;
        slot.batch.micro_batch = m;
        slot.batch.last_of_step = m == micro_batches_ - 1;
        slot.batch.step_valid_tokens = step_valid_tokens;
        slot.cursor_after = order_.position();

        lock.lock();
        ++produced_;
        lock.unlock();
        produced_changed_.notify_one();
      }
    }
    const std::lock_guard lock(mutex_);
    ended_ = true;
  } catch (...) {
    const std::lock_guard lock(mutex_);
    error_ = std::current_exception();
  }
  produced_changed_.notify_one();
}

// Chooses the samples of the next step for all ranks and counts their valid tokens, which follow
// from the document boundaries alone.
int64_t BatchStream::plan_step() {
  int64_t valid = 0;
  for (SampleRef& sample : plan_) {
    sample = order_.next();
    if (sample.id >= 0)
      valid += order_.epoch_order(sample.source, sample.epoch).valid_targets(sample.k);
  }
  return valid;
}

void BatchStream::fill(Slot& slot, int64_t first_in_step) {
  const int64_t seq_len = options_.pack.seq_len;
  HostMicroBatch& batch = slot.batch;
  batch = {};
  batch.sequences = options_.micro_batch;
  batch.seq_len = seq_len;
  batch.tokens_T = slot.tokens_T;
  batch.targets_T = slot.targets_T;
  batch.positions_T = slot.positions_T;
  batch.segment_offsets = slot.segment_offsets;
  batch.sample_ids = slot.sample_ids;

  segment_lengths_.clear();
  for (int64_t j = 0; j < options_.micro_batch; ++j) {
    const SampleRef& sample = plan_[first_in_step + j];
    const SequenceRows rows{slot.tokens_T + j * seq_len, slot.targets_T + j * seq_len,
                            slot.positions_T + j * seq_len};
    slot.sample_ids[j] = sample.id;
    if (sample.id < 0) {
      packer_.pack_empty(rows, segment_lengths_);
    } else {
      packer_.pack(order_.dataset(sample.source), order_.epoch_order(sample.source, sample.epoch),
                   sample.k, options_.vocab_size, rows, segment_lengths_);
    }
  }
  batch.num_segments = std::ssize(segment_lengths_);
  slot.segment_offsets[0] = 0;
  for (int64_t s = 0; s < batch.num_segments; ++s) {
    slot.segment_offsets[s + 1] = slot.segment_offsets[s] + segment_lengths_[s];
    batch.max_segment_len = std::max<int64_t>(batch.max_segment_len, segment_lengths_[s]);
  }
  const int64_t tokens = options_.micro_batch * seq_len;
  batch.valid_tokens = tokens - std::count(slot.targets_T, slot.targets_T + tokens, int32_t{-1});
}

const HostMicroBatch& BatchStream::next() {
  std::unique_lock lock(mutex_);
  DSTRAIN_CHECK(handed_out_ - released_ < std::ssize(slots_),
                "every slot is handed out; release one before the next");
  produced_changed_.wait(lock, [&] { return produced_ > handed_out_ || ended_ || error_; });
  if (produced_ == handed_out_) {
    if (error_) std::rethrow_exception(error_);
    DSTRAIN_CHECK(false, "the pass is over");
  }
  return slots_[handed_out_++ % std::ssize(slots_)].batch;
}

void BatchStream::release() {
  {
    const std::lock_guard lock(mutex_);
    DSTRAIN_CHECK(released_ < handed_out_, "no micro-batch is handed out");
    const Slot& slot = slots_[released_++ % std::ssize(slots_)];
    if (slot.batch.last_of_step) cursor_ = slot.cursor_after;
  }
  released_changed_.notify_one();
}

}  // namespace dstrain
