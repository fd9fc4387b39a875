// What the parts of the runtime share.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_on_cpu {

// What calls of the runtime return: as on a GPU, after a kernel that failed nothing works.
cudaError_t device_state();

// A block of the heap of exactly so many bytes, so that tools for the heap see what lies outside of
// it; aligned to 256, and full of NaN, of which all bits are set (the first 8 MiB of it). Null
// where there is not so much.
void* allocate_memory(size_t bytes);
// What the block that begins here has room for; without AddressSanitizer, a few bytes more than
// were asked for.
size_t allocated_bytes(void* memory);
void free_memory(void* memory);

// Bytes of the pieces that are registered from here on, one behind the other. A copy from one to
// the next fails, as the driver's does.
std::vector<size_t> registered_pieces(const void* block);
size_t registered_count();  // of pieces, wherever
// So many more are accepted.
void refuse_registrations_after(int64_t count);

}  // namespace cuda_on_cpu
