// The CPU back end: fp32 (fp64 for gradient checks), threads of its own, SIMD, matrix products from
// oneDNN. A call has finished when it returns; streams and events are therefore empty.
#pragma once

#include <memory>
#include <string>

#include "core/backend/backend.h"

namespace dstrain {

class MatmulLog;

// threads counts the calling thread; 0 takes the cores that this process may use. Every matrix
// product is added to `log`, if there is one; it outlives the back end.
std::unique_ptr<Backend> make_cpu_backend(int threads, MatmulLog* log = nullptr);

// Cores in this process's affinity mask, limited by the container's quota; at least 1.
int available_cores();
// Memory that this process can still take: what the system has available, within the container's
// limit. 0 if unknown.
int64_t available_memory_bytes();
// "oneDNN 2.6.3", or the CBLAS in use.
std::string matmul_library();
// "avx512", "avx2", "sse2": what this binary was compiled for. Throws RuntimeFailure, a sentence,
// if the processor lacks it.
std::string check_instruction_set();

}  // namespace dstrain
