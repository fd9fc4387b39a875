// The gradient of a linear layer's weight for a Hopper GPU: dW_e (+)= dy_e^T x_e per group of rows,
// from bf16, with sums in f32. Stores and additions to dW go on while the next part is multiplied.
#pragma once

#include "core/backend/ops.h"
#include "cuda/cuda_device.h"
#include "cuda/grouped_gemm.h"

namespace dstrain {

// Thread-compatible. Results do not depend on the GPU's number of SMs. Wants no scratch memory.
class HopperWeightGradient {
 public:
  explicit HopperWeightGradient(const CudaDevice& device);

  // Whether run() takes this: on a Hopper GPU, where rows begin at multiples of 16 bytes, and there
  // are at most 512 groups.
  bool takes(const GroupedLinear& linear) const;

  // weight_EOI is dW, in f32. Groups without rows get zeros (overwrite) or nothing (add). Sums
  // below the smallest normal number may become 0. Asynchronous.
  void run(Stream& stream, const GroupedLinear& linear, Accumulate accumulate) const;

 private:
  bool available_ = false;
  int num_sms_ = 0;
};

}  // namespace dstrain
