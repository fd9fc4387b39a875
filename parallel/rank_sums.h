// Sums and maxima of several buffers in a fixed order:
//   out[i] = ((x_0[i] + x_1[i]) + x_2[i]) + ...
// so that the bits depend on the order of the buffers alone, never on how a transport cuts its
// messages.
#pragma once

#include <cstdint>
#include <span>

#include "core/tensor/tensor.h"

namespace dstrain {

// Sums take f32, f64, i32, i64 (which wrap around) and bf16 (added in f32, rounded once, to nearest
// even); maxima take f32, f64 and i64 and keep a NaN. Other types fail a check.
enum class Reduction { sum, max };

// At least one buffer of `count` elements each. out may be one of them, and no other overlap.
// Reads all buffers once. Thread-safe on different `out`.
void reduce_in_order(Reduction reduction, DType dtype, std::span<const void* const> buffers,
                     int64_t count, void* out);

}  // namespace dstrain
