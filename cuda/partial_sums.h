// Second half of a sum over rows: parts of the rows have been summed, one row of f32 each.
#pragma once

#include <cstdint>

#include "core/backend/ops.h"

namespace dstrain {

// out_D (+)= sum over parts of partial_PD, in an order that depends on the shape only.
// Asynchronous; no parts are a sum of zero.
void sum_parts(Stream& stream, const float* partial_PD, int64_t parts, int64_t columns,
               Accumulate accumulate, float* out_D);

}  // namespace dstrain
