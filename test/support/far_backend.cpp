#include "test/support/far_backend.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
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
  void record(Stream& stream) override {
    stream_ = &dynamic_cast<FarStream&>(stream);
    at_ = stream_->queued();
  }
  void wait_on(Stream&) override {}  // operations run in the order of their calls
  void synchronize() override {
    if (stream_) stream_->arrive(at_);
  }

 private:
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

void FarStream::arrive(int64_t until) {
  for (; arrived_ < until; ++arrived_) {
    const std::function<void()> arrival = std::move(arrivals_.front());
    arrivals_.pop_front();
    arrival();
  }
}

FarBackend::FarBackend(int threads)
    : cpu_(make_cpu_backend(threads)),
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
  return std::make_unique<FarEvent>();
}

// Device memory is read and written at once: operations run in the order of their calls. The host's
// side is touched as late as it may be.
void FarBackend::copy(Stream& stream, void* destination, const void* source, int64_t bytes) {
  if (bytes == 0) return;
  FarStream& far = dynamic_cast<FarStream&>(stream);
  const size_t size = static_cast<size_t>(bytes);
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
