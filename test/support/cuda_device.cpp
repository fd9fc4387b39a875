#include "test/support/cuda_device.h"

#include <fmt/format.h>

#include <cstdlib>

#include "cuda/cuda_backend.h"
#include "cuda/cuda_device.h"

namespace dstrain::test {

// NCCL refuses a GPU that two ranks of one host have.
bool share_gpus() {
  const char* const wanted = std::getenv("DSTRAIN_TEST_SHARE_GPU");
  return wanted && *wanted;
}

std::string why_gpu_missing() {
  return why_no_gpu();
}

std::string why_gpus_missing(int processes) {
  if (std::string missing = why_no_gpu(); !missing.empty()) return missing;
  const int gpus = visible_gpus();
  if (processes <= gpus || share_gpus()) return "";
  return fmt::format("{} ranks need as many, and there are {}", processes, gpus);
}

std::unique_ptr<Backend> make_rank_backend(int process) {
  if (share_gpus()) setenv("NCCL_HOSTID", fmt::format("process {}", process).c_str(), 1);
  return make_gpu_backend(process % visible_gpus());
}

int64_t gpu_memory_free() {
  return free_gpu_memory();
}

std::unique_ptr<Backend> make_gpu_backend(int device) {
  CudaOptions options;
  options.device = device;
  options.deterministic = true;
  return make_cuda_backend(options);
}

Backend& gpu_backend() {
  static const std::unique_ptr<Backend> backend = make_gpu_backend(0);
  return *backend;
}

Stream& gpu_stream() {
  static const std::unique_ptr<Stream> stream = gpu_backend().make_stream();
  return *stream;
}

Tensor gpu_scratch() {
  auto& stream = static_cast<CudaStream&>(gpu_stream());
  return Tensor(stream.scratch(0), DType::f32, {stream.scratch_bytes() / dtype_bytes(DType::f32)});
}

}  // namespace dstrain::test
