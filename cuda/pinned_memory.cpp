#include "cuda/pinned_memory.h"

#include <algorithm>
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

// Writes to each page, so that the system has it ready.
void touch(char* memory, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kPage) static_cast<volatile char*>(memory)[at] = 0;
}

// Threads take neighbouring parts; what no thread could be had for is left to the driver.
void touch_by_threads(char* memory, int64_t bytes) {
  const int64_t count = std::clamp<int64_t>(available_cores(), 1, kMostThreads);
  const int64_t part = (bytes / count / kBlock + 1) * kBlock;
  std::vector<std::thread> threads;
  try {
    for (int64_t begin = 0; begin < bytes; begin += part)
      threads.emplace_back(touch, memory, begin, std::min(begin + part, bytes));
  } catch (const std::system_error&) {
  }
  for (std::thread& thread : threads) thread.join();
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
  touch_by_threads(static_cast<char*>(memory), bytes);
  if (cudaHostRegister(memory, static_cast<size_t>(bytes), cudaHostRegisterDefault) !=
      cudaSuccess) {
    cudaGetLastError();  // it must not be found by the next launch
    free_cpu_memory(memory, bytes);
    return nullptr;
  }
  const std::lock_guard lock(mutex_);
  mapped_.insert(memory);
  return memory;
}

void PinnedMemory::free(void* memory, int64_t bytes) noexcept {
  bool is_mapped = false;
  {
    const std::lock_guard lock(mutex_);
    is_mapped = mapped_.erase(memory) > 0;
  }
  if (!is_mapped) {
    cudaFreeHost(memory);
    return;
  }
  cudaHostUnregister(memory);
  free_cpu_memory(memory, bytes);
}

}  // namespace dstrain
