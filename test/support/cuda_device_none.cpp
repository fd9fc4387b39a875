// Stands in for cuda_device.cpp in programs without the CUDA back end.
#include "test/support/cuda_device.h"

#include "core/base/error.h"

namespace dstrain::test {

std::string why_gpu_missing() {
  return "this program was built without the CUDA back end";
}

bool share_gpus() {
  return false;
}

std::string why_gpus_missing(int) {
  return why_gpu_missing();
}

std::unique_ptr<Backend> make_rank_backend(int) {
  throw RuntimeFailure(why_gpu_missing());
}

int64_t gpu_memory_free() {
  return 0;
}

std::unique_ptr<Backend> make_gpu_backend(int) {
  throw RuntimeFailure(why_gpu_missing());
}

Backend& gpu_backend() {
  throw RuntimeFailure(why_gpu_missing());
}

Stream& gpu_stream() {
  throw RuntimeFailure(why_gpu_missing());
}

Tensor gpu_scratch() {
  return {};
}

}  // namespace dstrain::test
