// Host memory that the GPU copies from and to by itself.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>

namespace dstrain {

// The driver takes pages for cudaHostAlloc one by one, some seconds for every ten GB. Large blocks
// are therefore mapped in huge pages here, touched by several threads, and only registered with the
// driver, piece by piece: it lets no other thread queue anything while it registers one. Where it
// refuses that, cudaHostAlloc serves. Thread-safe.
class PinnedMemory {
 public:
  // Pieces of a whole number of huge pages (2 MiB).
  explicit PinnedMemory(int64_t piece_bytes = int64_t{1} << 30) : piece_bytes_(piece_bytes) {}
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  // For the thread's current GPU. cudaErrorMemoryAllocation where there is not enough.
  cudaError_t allocate(int64_t bytes, void** memory);
  void free(void* memory, int64_t bytes) noexcept;
  // How many of the `bytes` from `at` on, of any memory, one copy may take: the driver refuses one
  // that goes from piece to piece.
  int64_t copyable_bytes(const void* at, int64_t bytes) const;

 private:
  void* map(int64_t bytes);
  bool register_pieces(char* memory, int64_t bytes);
  void unregister_pieces(char* memory, int64_t bytes) noexcept;

  const int64_t piece_bytes_;
  mutable std::mutex mutex_;
  std::map<const char*, int64_t, std::less<>> mapped_;  // blocks and their bytes
};

}  // namespace dstrain
