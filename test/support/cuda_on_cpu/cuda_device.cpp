// The CPU in place of the GPU that tests compute on.
#include "test/support/cuda_device.h"

#include <algorithm>

#include "cuda/cuda_backend.h"
#include "cuda/cuda_device.h"

namespace dstrain::test {

std::string why_gpu_missing() {
  return "";
}

bool share_gpus() {
  return false;
}

std::string why_gpus_missing(int) {
  return "";
}

std::unique_ptr<Backend> make_rank_backend(int) {
  return make_gpu_backend(0);
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

// Its beginning: operations of tests take no more, and every test fills it.
Tensor gpu_scratch() {
  constexpr int64_t kMostBytes = SeparateScratchPieces::kContents;
  auto& stream = static_cast<CudaStream&>(gpu_stream());
  const int64_t bytes = std::min(kMostBytes, stream.scratch_bytes());
  return Tensor(stream.scratch(0), DType::f32, {bytes / dtype_bytes(DType::f32)});
}

}  // namespace dstrain::test
