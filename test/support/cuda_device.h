// The GPU that tests compute on: one back end and one stream per process, opened at first use.
// Programs without the CUDA back end have none.
#pragma once

#include <string>

#include "core/backend/backend.h"

namespace dstrain::test {

// Why this process has no GPU, or "".
std::string why_gpu_missing();

Backend& gpu_backend();
Stream& gpu_stream();
// The memory that operations on gpu_stream() use for themselves, as f32.
Tensor gpu_scratch();

}  // namespace dstrain::test
