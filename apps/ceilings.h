// What a device reaches on plain work, to hold the time of operations against.
#pragma once

#include "core/backend/backend.h"
#include "core/tensor/tensor.h"

namespace dstrain {

struct Ceilings {
  double flops = 0;  // per second, of a large square product of random numbers
  double bytes = 0;  // per second, of a large copy in its memory, read and written

  // Seconds below which no operation with this much work ends.
  double least_seconds(double flops, double bytes) const;
};

// Measured on a stream of its own, in a fraction of a second; what it allocates is free afterwards.
// The product takes operands of dtype and sums in f32.
Ceilings measure_ceilings(Backend& backend, DType dtype);

}  // namespace dstrain
