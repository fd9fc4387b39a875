// Failures of CUDA calls as sentences. A launch is checked with check_launch right after it; what goes wrong
// while a kernel runs shows at the next call that waits.
#pragma once

#include <cuda_runtime_api.h>

#include "core/base/error.h"

namespace dstrain {

// Throws RuntimeFailure: what was tried, and what CUDA says of it.
[[noreturn]] void throw_cuda(cudaError_t error, const char* what);

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw_cuda(error, what);
}

inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

}  // namespace dstrain
