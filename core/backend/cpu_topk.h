// The choice of the elements that top-k sends of a block (core/backend/compressed_format.h).
#pragma once

#include <cstdint>

namespace dstrain {

// Bytes of scratch memory that choose_topk needs for blocks of up to `block` elements.
int64_t topk_scratch_bytes(int64_t block);

// Writes the indices, ascending, of the k elements of v_n that have the largest magnitudes (their
// bits without the sign, so that NaN is largest); among equal ones the lower index is chosen.
// 1 <= k <= n <= 65536. Takes about the same time whatever the elements are. `scratch` is 64-byte
// aligned.
void choose_topk(const float* v_n, int64_t n, int64_t k, void* scratch, uint16_t* indices_k);

}  // namespace dstrain
