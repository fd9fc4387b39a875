#include "cuda/pinned_memory.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <system_error>
#include <thread>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "core/backend/cpu_memory.h"
#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr int64_t kMappedFrom = int64_t{64} << 20;
constexpr int64_t kPage = 4096;               // or a multiple of it
constexpr int64_t kBlock = int64_t{2} << 20;  // a huge page is filled by one thread
constexpr int64_t kMostThreads = 16;
constexpr std::chrono::milliseconds kTurn{1};  // of those who wait for the driver between pieces

// Writes to each page, so that the system has it ready.
void touch(char* memory, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kPage) static_cast<volatile char*>(memory)[at] = 0;
}

// Threads take neighbouring parts; what no thread could be had for is left to the driver.
std::vector<std::jthread> touch_by_threads(char* memory, int64_t bytes) {
  const int64_t count = std::clamp<int64_t>(available_cores(), 1, kMostThreads);
  const int64_t part = (bytes / count / kBlock + 1) * kBlock;
  std::vector<std::jthread> threads;
  try {
    for (int64_t begin = 0; begin < bytes; begin += part)
      threads.emplace_back(touch, memory, begin, std::min(begin + part, bytes));
  } catch (const std::system_error&) {
  }
  return threads;
}

}  // namespace

cudaError_t PinnedMemory::allocate(int64_t bytes, void** memory) {
  if (bytes >= kMappedFrom) *memory = map(bytes);
  if (bytes >= kMappedFrom && *memory) return cudaSuccess;
  return cudaHostAlloc(memory, static_cast<size_t>(bytes), cudaHostAllocDefault);
}

// Null where the system or the driver refuses. Touching more than there is would end the process.
void* PinnedMemory::map(int64_t bytes) {
  const int64_t available = available_memory_bytes();
  if (available > 0 && bytes > available) return nullptr;
  void* memory = nullptr;
  try {
    memory = allocate_cpu_memory(bytes);
  } catch (const RuntimeFailure&) {
    return nullptr;
  }
  if (!register_pieces(static_cast<char*>(memory), bytes)) {
    free_cpu_memory(memory, bytes);
    return nullptr;
  }
  const std::lock_guard lock(mutex_);
  mapped_.emplace(static_cast<char*>(memory), bytes);
  return memory;
}

// While one piece is registered, threads touch the next. False, and nothing is registered, where
// the driver refuses one.
bool PinnedMemory::register_pieces(char* memory, int64_t bytes) {
  std::vector<std::jthread> touching = touch_by_threads(memory, std::min(piece_bytes_, bytes));
  for (int64_t begin = 0, end; begin < bytes; begin = end) {
    end = std::min(begin + piece_bytes_, bytes);
    touching.clear();  // waits for them
    touching = touch_by_threads(memory + end, std::min(piece_bytes_, bytes - end));
    if (begin > 0) std::this_thread::sleep_for(kTurn);
    const cudaError_t error =
        cudaHostRegister(memory + begin, static_cast<size_t>(end - begin), cudaHostRegisterDefault);
    if (error == cudaSuccess) continue;
    cudaGetLastError();  // it must not be found by the next launch
    unregister_pieces(memory, begin);
    return false;
  }
  return true;
}

void PinnedMemory::unregister_pieces(char* memory, int64_t bytes) noexcept {
  for (int64_t begin = 0; begin < bytes; begin += piece_bytes_) cudaHostUnregister(memory + begin);
}

void PinnedMemory::free(void* memory, int64_t bytes) noexcept {
  bool is_mapped = false;
  {
    const std::lock_guard lock(mutex_);
    is_mapped = mapped_.erase(static_cast<const char*>(memory)) > 0;
  }
  if (!is_mapped) {
    cudaFreeHost(memory);
    return;
  }
  unregister_pieces(static_cast<char*>(memory), bytes);
  free_cpu_memory(memory, bytes);
}

int64_t PinnedMemory::copyable_bytes(const void* at, int64_t bytes) const {
  const std::lock_guard lock(mutex_);
  const auto next = mapped_.upper_bound(static_cast<const char*>(at));
  if (next == mapped_.begin()) return bytes;
  const auto& [block, block_bytes] = *std::prev(next);
  const int64_t offset = static_cast<const char*>(at) - block;
  return offset < block_bytes ? std::min(bytes, piece_bytes_ - offset % piece_bytes_) : bytes;
}

}  // namespace dstrain
