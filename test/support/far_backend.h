// A GPU's memory on a CPU: the host cannot touch what operations compute on, and copies to the host
// arrive when somebody waits for them. Whoever reads device memory directly crashes, whoever reads
// a result too early finds nonsense, and whoever changes host memory that is still being copied is
// told so. Copies on streams for copies read and write when somebody waits for them, as late as
// they may: whoever changes what they read without waiting finds the change in the copy. Arithmetic
// is the CPU back end's, in f32, to the bit; on streams for copies there is none.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/backend/timed_ops.h"

namespace dstrain::test {

// Memory that is closed but for the time between open() and close(), which belongs to one thread.
class ClosedMemory {
 public:
  ClosedMemory();
  ~ClosedMemory();
  ClosedMemory(const ClosedMemory&) = delete;
  ClosedMemory& operator=(const ClosedMemory&) = delete;

  void* take(int64_t bytes);  // 256-byte aligned; it is never given back
  bool holds(const void* memory) const { return memory >= base_ && memory < base_ + kBytes; }
  void open() {
    mutex_.lock();
    protect(true);
  }
  void close() {
    protect(false);
    mutex_.unlock();
  }

 private:
  static constexpr int64_t kBytes = int64_t{1} << 30;  // of addresses
  void protect(bool is_open);
  std::mutex mutex_;
  char* base_ = nullptr;
  int64_t used_ = 0;
};

class FarStream : public Stream {
 public:
  explicit FarStream(bool for_copies = false) : for_copies_(for_copies) {}
  bool for_copies() const { return for_copies_; }
  void* native() const override { return nullptr; }
  void synchronize() override {
    arrive(queued_);
    ++synchronizations_;
  }
  int64_t synchronizations() const { return synchronizations_; }
  void queue(std::function<void()> arrival);
  int64_t queued() const { return queued_; }
  // What was queued first, up to so many since the start. Any thread; one at a time.
  void arrive(int64_t until);
  bool has_arrived(int64_t until) const { return arrived_ >= until; }

 private:
  const bool for_copies_;
  std::mutex mutex_;
  std::deque<std::function<void()>> arrivals_;
  int64_t queued_ = 0, synchronizations_ = 0;
  std::atomic<int64_t> arrived_ = 0;
};

class FarBackend : public Backend {
 public:
  // A host that waits for copies gives others so long to wait for them before: a thread that
  // writes them does not end what it is to run beside.
  explicit FarBackend(int threads = 1, std::chrono::milliseconds patience = {});

  std::string describe() const override { return "far"; }
  bool is_cpu() const override { return false; }
  void* allocate(int64_t bytes, MemoryKind kind) override;
  void deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept override;
  int64_t workspace_bytes() const override { return 0; }
  Ops& planning_ops() override { return cpu_->planning_ops(); }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<FarStream>(); }
  std::unique_ptr<Stream> make_copy_stream() override { return std::make_unique<FarStream>(true); }
  std::unique_ptr<Event> make_event() override;
  void copy(Stream& stream, void* destination, const void* source, int64_t bytes) override;
  Ops& ops() override { return *ops_; }

 private:
  ClosedMemory memory_;
  const std::chrono::milliseconds patience_;
  const std::unique_ptr<Backend> cpu_;
  std::unique_ptr<OpClock> door_;
  std::unique_ptr<Ops> ops_;
};

}  // namespace dstrain::test
