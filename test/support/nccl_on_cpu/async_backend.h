// A back end whose streams are those of queue.h: calls return at once, and the CPU back end makes
// them when the stream gets there, beside other streams. NCCL's communicators take them for a
// GPU's.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "core/backend/backend.h"
#include "core/base/error.h"

namespace dstrain::test {

class AsyncStream;

class AsyncBackend : public Backend {
 public:
  // Without waits, streams do not wait for events: a planted fault.
  enum class Waits { yes, no };
  // Makes `device` the calling thread's.
  explicit AsyncBackend(int device, Waits waits = Waits::yes);
  ~AsyncBackend() override;

  std::string describe() const override { return "asynchronous"; }
  bool is_cpu() const override { return false; }
  void* allocate(int64_t bytes, MemoryKind kind) override;
  // Waits for all streams, as the CUDA runtime does.
  void deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept override;
  int64_t workspace_bytes() const override { return 0; }
  Ops& planning_ops() override { return cpu_->planning_ops(); }
  std::unique_ptr<Stream> make_stream() override;
  std::unique_ptr<Event> make_event() override;
  std::unique_ptr<OpClock> make_clock() override;
  void copy(Stream& stream, void* destination, const void* source, int64_t bytes) override;
  Ops& ops() override { return *ops_; }

 private:
  friend class AsyncStream;
  const Waits waits_;
  const std::unique_ptr<Backend> cpu_;
  std::unique_ptr<Ops> ops_;
  std::mutex mutex_;
  std::vector<AsyncStream*> streams_;
};

}  // namespace dstrain::test
