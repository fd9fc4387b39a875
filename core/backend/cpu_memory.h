// Memory of the CPU back end. Large blocks come straight from the kernel, on huge pages where it
// has them: the arenas of a run are gigabytes that every step walks through.
#pragma once

#include <cstdint>

namespace dstrain {

// 256-byte aligned; large blocks are zero, small ones are not initialised. 0 bytes give a valid
// pointer. Throws RuntimeFailure that names the size. Thread-safe.
void* allocate_cpu_memory(int64_t bytes);
// `bytes` as it was asked for; memory may be null.
void free_cpu_memory(void* memory, int64_t bytes) noexcept;

}  // namespace dstrain
