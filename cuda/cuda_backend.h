// The CUDA back end: one GPU of compute capability 8.0 or later. Calls queue work and return.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/backend/backend.h"

namespace dstrain {

struct CudaOptions {
  int device = 0;
  bool deterministic = false;
  bool tf32 = false;  // products of f32 in TF32: 10 bits of mantissa, eight times the rate
  std::string cache_folder =
      {};  // where choices of algorithms are kept from run to run; empty: nowhere
};

// GPUs that this process may use; 0 without a driver. Never throws.
int visible_gpus();
// Why there is none, or empty: "no driver", "the driver is older than CUDA 13.0", ...
std::string why_no_gpu();

// Bytes that are free on the GPU of the last back end that this thread made; 0 if that cannot be
// told.
int64_t free_gpu_memory();
// Where that GPU sits in its host, "0000:1B:00.0": what tells two of them apart.
std::string gpu_bus_id();

// Throws RuntimeFailure, a sentence, if the device does not exist, is too old, or cannot be opened.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);

}  // namespace dstrain
