#include "test/support/cuda_device.h"

#include "cuda/cuda_backend.h"
#include "cuda/cuda_device.h"

namespace dstrain::test {

std::string why_gpu_missing() {
  return why_no_gpu();
}

int gpu_count() {
  return visible_gpus();
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
