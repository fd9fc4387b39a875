// The GPU that tests compute on: one back end and one stream per process, opened at first use.
// Programs without the CUDA back end have none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/backend/backend.h"
#include "test/support/run_program.h"

namespace dstrain::test {

// Why this process has no GPU, or "".
std::string why_gpu_missing();
// Says so if the test cannot run.
inline bool skipped_without_gpu() {
  const std::string missing = why_gpu_missing();
  if (!missing.empty()) print_skipped("no GPU: " + missing);
  return !missing.empty();
}

int gpu_count();
int64_t gpu_memory_free();  // in bytes, of the calling thread's GPU
// For a rank that has a GPU of its own. Runs give the same bits.
std::unique_ptr<Backend> make_gpu_backend(int device);
// On the first GPU.
Backend& gpu_backend();
Stream& gpu_stream();
// The memory that operations on gpu_stream() use for themselves, as f32.
Tensor gpu_scratch();

}  // namespace dstrain::test
