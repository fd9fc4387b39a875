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

// With DSTRAIN_TEST_SHARE_GPU in the environment, processes share what GPUs there are: NCCL takes
// each process for a host of its own, and data travel over sockets.
bool share_gpus();
// Why so many processes cannot have a GPU each, or "".
std::string why_gpus_missing(int processes);
// For one of them. Runs give the same bits.
std::unique_ptr<Backend> make_rank_backend(int process);

int64_t gpu_memory_free();  // in bytes, of the calling thread's GPU
std::unique_ptr<Backend> make_gpu_backend(int device);
// On the first GPU.
Backend& gpu_backend();
Stream& gpu_stream();
// The memory that operations on gpu_stream() use for themselves, as f32.
Tensor gpu_scratch();

}  // namespace dstrain::test
