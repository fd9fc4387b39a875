#include "test/support/far_backend.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "core/backend/cpu_backend.h"
#include "core/base/error.h"

namespace dstrain::test {
namespace {

constexpr int kNonsense = 0xa5;

// Marked before and after each operation: opens the memory for its time.
class Door : public OpClock {
 public:
  explicit Door(ClosedMemory& memory) : memory_(memory) {}
  int mark(Stream&) override {
    std::exchange(is_open_, !is_open_) ? memory_.close() : memory_.open();
    return 0;
  }
  double seconds_between(int, int) override { return 0; }
  void clear() override {}

 private:
  ClosedMemory& memory_;
  bool is_open_ = false;
};

class FarEvent : public Event {
 public:
  explicit FarEvent(std::chrono::milliseconds patience) : patience_(patience) {}
  void record(Stream& stream) override {
    stream_ = &dynamic_cast<FarStream&>(stream);
    at_ = stream_->queued();
  }
  // Operations run in the order of their calls: only copies are still to come.
  void wait_on(Stream& stream) override {
    if (!stream_ || !stream_->for_copies()) return;
    auto& waiting = dynamic_cast<FarStream&>(stream);
    if (waiting.for_copies())
      waiting.queue([copies = stream_, at = at_] { copies->arrive(at); });
    else
      stream_->arrive(at_);
  }
  void synchronize() override {
    if (!stream_) return;
    const auto end = std::chrono::steady_clock::now() + patience_;
    while (stream_->for_copies() && !stream_->has_arrived(at_) &&
           std::chrono::steady_clock::now() < end)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    stream_->arrive(at_);
  }

 private:
  const std::chrono::milliseconds patience_;
  FarStream* stream_ = nullptr;
  int64_t at_ = 0;
};

std::vector<char> bytes_at(const void* memory, int64_t bytes) {
  const char* const begin = static_cast<const char*>(memory);
  return {begin, begin + bytes};
}

}  // namespace

ClosedMemory::ClosedMemory() {
  void* const memory =
      ::mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  DSTRAIN_CHECK(memory != MAP_FAILED, "no addresses for memory that is closed");
  base_ = static_cast<char*>(memory);
}

ClosedMemory::~ClosedMemory() {
  ::munmap(base_, kBytes);
}

void* ClosedMemory::take(int64_t bytes) {
  constexpr int64_t kAlignment = 256;
  char* const memory = base_ + used_;
  used_ += (std::max<int64_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  DSTRAIN_CHECK(used_ <= kBytes, "a test takes too much memory");
  return memory;
}

void ClosedMemory::protect(bool is_open) {
  const int failed =
      ::mprotect(base_, static_cast<size_t>(used_), is_open ? PROT_READ | PROT_WRITE : PROT_NONE);
  DSTRAIN_CHECK(failed == 0, "memory cannot be opened and closed");
}

void FarStream::queue(std::function<void()> arrival) {
  const std::lock_guard lock(mutex_);
  arrivals_.push_back(std::move(arrival));
  ++queued_;
}

void FarStream::arrive(int64_t until) {
  if (has_arrived(until)) return;  // what runs here may wait for a point before it
  const std::lock_guard lock(mutex_);
  for (; arrived_ < until; ++arrived_) {
    const std::function<void()> arrival = std::move(arrivals_.front());
    arrivals_.pop_front();
    arrival();
  }
}

FarBackend::FarBackend(int threads, std::chrono::milliseconds patience)
    : patience_(patience),
      cpu_(make_cpu_backend(threads)),
      door_(std::make_unique<Door>(memory_)),
      ops_(std::make_unique<TimedOps>(cpu_->ops(), *door_)) {}

void* FarBackend::allocate(int64_t bytes, MemoryKind kind) {
  if (kind == MemoryKind::host) return cpu_->allocate(bytes, kind);
  void* const memory = memory_.take(bytes);
  memory_.open();
  std::memset(memory, 0xff, static_cast<size_t>(bytes));  // NaN
  memory_.close();
  return memory;
}

void FarBackend::deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept {
  if (kind == MemoryKind::host) cpu_->deallocate(memory, bytes, kind);
}

std::unique_ptr<Event> FarBackend::make_event() {
  return std::make_unique<FarEvent>(patience_);
}

// Device memory is read and written at once: operations run in the order of their calls. The host's
// side is touched as late as it may be.
void FarBackend::copy(Stream& stream, void* destination, const void* source, int64_t bytes) {
  if (bytes == 0) return;
  FarStream& far = dynamic_cast<FarStream&>(stream);
  const size_t size = static_cast<size_t>(bytes);
  if (far.for_copies()) {
    if (!memory_.holds(destination)) std::memset(destination, kNonsense, size);
    far.queue([=, this] {
      memory_.open();
      std::memcpy(destination, source, size);
      memory_.close();
    });
    return;
  }
  memory_.open();
  std::vector<char> contents = bytes_at(source, bytes);
  if (memory_.holds(destination)) std::memcpy(destination, contents.data(), size);
  memory_.close();
  if (!memory_.holds(destination)) {
    std::memset(destination, kNonsense, size);
    far.queue([=] { std::memcpy(destination, contents.data(), size); });
  } else if (!memory_.holds(source)) {
    far.queue([=] {
      DSTRAIN_CHECK(std::memcmp(source, contents.data(), size) == 0,
                    "host memory was changed while it was copied to the device");
    });
  }
}

}  // namespace dstrain::test
