// What the matrix products of a step cost by themselves: the floor that the rest of a step is compared to.
#pragma once

#include <span>

#include "core/backend/cpu_gemm.h"

namespace dstrain {

// Seconds of the fastest of `repeats` passes over the list in f32, on buffers of random numbers that are
// larger than the caches' share. Products of at least 8 MFLOP run one after the other on all threads of the
// library; smaller ones (attention blocks) run side by side, one thread each, as suits the library best.
double time_products(std::span<const ProductShape> products, int threads, int repeats);

}  // namespace dstrain
