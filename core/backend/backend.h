// One device: its memory, its queues of work and its arithmetic. The CPU back end runs a call before
// it returns; the CUDA back end queues it. Code above this line may not tell the difference: it waits
// through events and streams only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "core/tensor/tensor.h"

namespace dstrain {

class OpClock;
class Ops;

// An ordered queue of work on one device.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual void* native() const = 0;  // cudaStream_t, or null on a CPU
  virtual void synchronize() = 0;    // the host waits for everything queued so far
  // Kernels queued from now on that would fill the device leave so many of its multiprocessors to other
  // streams, where they can.
  virtual void leave_room(int multiprocessors) { static_cast<void>(multiprocessors); }
};

// A point in a stream.
class Event {
 public:
  virtual ~Event() = default;
  virtual void record(Stream& stream) = 0;   // asynchronous
  virtual void wait_on(Stream& stream) = 0;  // the stream waits, the host does not
  virtual void synchronize() = 0;            // the host waits; any thread may call it
};

enum class MemoryKind {
  device,  // where Ops compute
  host,    // staging that the device can copy from and to without blocking (pinned on a GPU)
};

// Thread-compatible: one thread drives a Backend and its streams.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string describe() const = 0;  // "2 threads, avx512, oneDNN 2.6.3"
  virtual bool is_cpu() const = 0;

  // 256-byte aligned. Throws RuntimeFailure that names the size when memory runs out. Any thread
  // may allocate host memory.
  virtual void* allocate(int64_t bytes, MemoryKind kind) = 0;
  virtual void deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept = 0;

  // What its operations keep for themselves; scratch of concurrent streams lies apart. Known for a run when its
  // calls have been made once on planning_ops().
  virtual int64_t workspace_bytes() const = 0;
  // Operations that compute nothing and note what the real ones need on their shapes.
  virtual Ops& planning_ops() = 0;
  // Before memory is allocated: what the first step would otherwise do for what planning_ops() saw. Waits.
  virtual void prepare(Stream&) {}

  virtual std::unique_ptr<Stream> make_stream() = 0;
  // What is queued here goes before what other streams have not begun: others wait for it.
  virtual std::unique_ptr<Stream> make_urgent_stream() { return make_stream(); }
  // For copies, and element-wise work on their way, beside streams that compute: what is queued
  // here goes first, and operations find no scratch.
  virtual std::unique_ptr<Stream> make_copy_stream() { return make_stream(); }
  virtual std::unique_ptr<Event> make_event() = 0;
  // core/backend/op_clock.h; the host's, unless a device has its own.
  virtual std::unique_ptr<OpClock> make_clock();

  // Any direction between host and device memory; asynchronous on the stream, so both sides must
  // stay valid until it has passed.
  virtual void copy(Stream& stream, void* destination, const void* source, int64_t bytes) = 0;

  virtual Ops& ops() = 0;
};

// Owner of one Backend allocation.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(Backend& backend, int64_t bytes, MemoryKind kind)
      : backend_(&backend), bytes_(bytes), kind_(kind), data_(backend.allocate(bytes, kind)) {}
  DeviceMemory(DeviceMemory&& other) noexcept { swap(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceMemory() {
    if (data_) backend_->deallocate(data_, bytes_, kind_);
  }
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(DeviceMemory& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(bytes_, other.bytes_);
    std::swap(kind_, other.kind_);
    std::swap(data_, other.data_);
  }
  Backend* backend_ = nullptr;
  int64_t bytes_ = 0;
  MemoryKind kind_ = MemoryKind::device;
  void* data_ = nullptr;
};

}  // namespace dstrain
