#include "core/backend/cpu_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "core/base/error.h"
#include "core/base/format_units.h"

namespace dstrain {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kMappedFrom = int64_t{4} << 20;  // smaller blocks come from the C library
constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

int64_t mapped_bytes(int64_t bytes) {
  return round_up(bytes, sysconf(_SC_PAGESIZE));
}

// Maps one huge page more than needed and gives the ends back, so that the block begins on one.
void* map_block(int64_t bytes) {
  const int64_t length = mapped_bytes(bytes);
  void* const mapping = mmap(nullptr, static_cast<size_t>(length + kHugePage),
                             PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapping);
  const int64_t skipped = -reinterpret_cast<intptr_t>(begin) & (kHugePage - 1);
  if (skipped > 0) munmap(begin, static_cast<size_t>(skipped));
  munmap(begin + skipped + length, static_cast<size_t>(kHugePage - skipped));
#ifdef MADV_HUGEPAGE
  madvise(begin + skipped, static_cast<size_t>(length), MADV_HUGEPAGE);  // a wish; may be refused
#endif
  return begin + skipped;
}

}  // namespace

void* allocate_cpu_memory(int64_t bytes) {
  DSTRAIN_CHECK(bytes >= 0, "memory of a negative size was asked for");
  void* memory = nullptr;
  int error = ENOMEM;
  if (bytes < kMappedFrom) {
    memory = std::aligned_alloc(
        kAlignment, static_cast<size_t>(round_up(std::max(bytes, kAlignment), kAlignment)));
  } else if (bytes <= std::numeric_limits<int64_t>::max() / 2) {
    memory = map_block(bytes);
    error = errno;
  }
  if (!memory) {
    throw RuntimeFailure("out of memory: cannot allocate " + format_bytes(bytes) + " (" +
                         std::to_string(bytes) + " bytes): " + std::strerror(error) +
                         "; make the model, the micro-batch or the sequences smaller");
  }
  return memory;
}

void free_cpu_memory(void* memory, int64_t bytes) noexcept {
  if (!memory) return;
  if (bytes < kMappedFrom) {
    std::free(memory);
  } else {
    munmap(memory, static_cast<size_t>(mapped_bytes(bytes)));
  }
}

}  // namespace dstrain
