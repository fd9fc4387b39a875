#include "test/support/nccl_on_cpu/async_backend.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/backend/cpu_backend.h"
#include "core/backend/op_clock.h"
#include "test/support/nccl_on_cpu/queue.h"
#include "test/support/queued_ops.h"

namespace dstrain::test {
namespace {

void check(cudaError_t error, nccl_on_cpu::Queue* queue = nullptr) {
  if (error != cudaSuccess)
    throw RuntimeFailure("the GPU failed: " + (queue ? queue->failure() : "work threw"));
}

}  // namespace

class AsyncStream : public Stream {
 public:
  explicit AsyncStream(AsyncBackend& backend)
      : backend_(backend), cpu_(make_cpu_backend(1)), cpu_stream_(cpu_->make_stream()) {
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, 0));
    const std::lock_guard lock(backend_.mutex_);
    backend_.streams_.push_back(this);
  }
  ~AsyncStream() override {
    {
      const std::lock_guard lock(backend_.mutex_);
      std::erase(backend_.streams_, this);
    }
    queue().wait_for_all();
    cudaStreamDestroy(stream_);
  }
  AsyncStream(const AsyncStream&) = delete;
  AsyncStream& operator=(const AsyncStream&) = delete;

  void* native() const override { return stream_; }
  void synchronize() override { check(cudaStreamSynchronize(stream_), &queue()); }
  nccl_on_cpu::Queue& queue() { return nccl_on_cpu::queue_of(stream_); }
  // What runs on this stream alone, with scratch of its own.
  Backend& cpu() { return *cpu_; }
  Stream& cpu_stream() { return *cpu_stream_; }

 private:
  AsyncBackend& backend_;
  const std::unique_ptr<Backend> cpu_;
  const std::unique_ptr<Stream> cpu_stream_;
  cudaStream_t stream_ = nullptr;
};

namespace {

AsyncStream& async(Stream& stream) {
  return dynamic_cast<AsyncStream&>(stream);
}

class AsyncEvent : public Event {
 public:
  explicit AsyncEvent(bool waits = true) : waits_(waits) {
    check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
  }
  ~AsyncEvent() override { cudaEventDestroy(event_); }
  AsyncEvent(const AsyncEvent&) = delete;
  AsyncEvent& operator=(const AsyncEvent&) = delete;
  void record(Stream& stream) override {
    check(cudaEventRecord(event_, static_cast<cudaStream_t>(stream.native())));
  }
  void wait_on(Stream& stream) override {
    if (waits_) check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream.native()), event_, 0));
  }
  void synchronize() override { check(cudaEventSynchronize(event_)); }

 private:
  const bool waits_;
  cudaEvent_t event_ = nullptr;
};

class AsyncClock : public OpClock {
 public:
  int mark(Stream& stream) override {
    Mark& mark = *marks_.emplace_back(std::make_unique<Mark>());
    async(stream).queue().push([&mark] { mark.time = std::chrono::steady_clock::now(); });
    mark.passed.record(stream);
    return static_cast<int>(marks_.size()) - 1;
  }
  double seconds_between(int first, int second) override {
    const auto time = [&](int number) {
      Mark& mark = *marks_[static_cast<size_t>(number)];
      mark.passed.synchronize();
      return mark.time;
    };
    return std::chrono::duration<double>(time(second) - time(first)).count();
  }
  void clear() override {
    for (const auto& mark : marks_) mark->passed.synchronize();
    marks_.clear();
  }

 private:
  struct Mark {
    std::chrono::steady_clock::time_point time;
    AsyncEvent passed;
  };
  std::vector<std::unique_ptr<Mark>> marks_;
};

class AsyncOps : public QueuedOps {
 protected:
  void queue(Stream& stream, OpCall call) override {
    AsyncStream& on = async(stream);
    on.queue().push([run = std::move(call.run), &on] { run(on.cpu().ops(), on.cpu_stream()); });
  }
};

}  // namespace

AsyncBackend::AsyncBackend(int device, Waits waits)
    : waits_(waits), cpu_(make_cpu_backend(1)), ops_(std::make_unique<AsyncOps>()) {
  check(cudaSetDevice(device));
}
AsyncBackend::~AsyncBackend() = default;

void* AsyncBackend::allocate(int64_t bytes, MemoryKind kind) {
  void* const memory = cpu_->allocate(bytes, kind);
  if (kind == MemoryKind::device) {
    std::memset(memory, 0xff, static_cast<size_t>(bytes));  // NaN
    nccl_on_cpu::add_device_memory(memory, bytes);
  }
  return memory;
}

void AsyncBackend::deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept {
  {
    const std::lock_guard lock(mutex_);
    for (AsyncStream* const stream : streams_) stream->queue().wait_for_all();
  }
  if (kind == MemoryKind::device) nccl_on_cpu::remove_device_memory(memory);
  cpu_->deallocate(memory, bytes, kind);
}

std::unique_ptr<Stream> AsyncBackend::make_stream() {
  return std::make_unique<AsyncStream>(*this);
}

std::unique_ptr<Event> AsyncBackend::make_event() {
  return std::make_unique<AsyncEvent>(waits_ == Waits::yes);
}

std::unique_ptr<OpClock> AsyncBackend::make_clock() {
  return std::make_unique<AsyncClock>();
}

void AsyncBackend::copy(Stream& stream, void* destination, const void* source, int64_t bytes) {
  if (bytes == 0) return;
  async(stream).queue().push([=] { std::memcpy(destination, source, static_cast<size_t>(bytes)); });
}

}  // namespace dstrain::test
