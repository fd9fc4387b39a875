// Host memory that the GPU copies from and to by itself.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <set>

namespace dstrain {

// The driver takes pages for cudaHostAlloc one by one, some seconds for every ten GB. Large blocks
// are therefore mapped in huge pages here, touched by several threads, and only registered with the
// driver; where it refuses that, cudaHostAlloc serves. Thread-safe.
class PinnedMemory {
 public:
  // For the thread's current GPU. cudaErrorMemoryAllocation where there is not enough.
  cudaError_t allocate(int64_t bytes, void** memory);
  void free(void* memory, int64_t bytes) noexcept;

 private:
  void* map(int64_t bytes);

  std::mutex mutex_;
  std::set<const void*> mapped_;
};

}  // namespace dstrain
