// Products over groups of rows on the tensor cores of a Hopper GPU: bf16 operands, sums in f32. The
// groups' sizes are known to the device only: nothing here waits for it.
// Legend: E groups (experts), R rows of all groups, O and I output and input features.
#pragma once

#include <cstdint>

#include "core/backend/ops.h"
#include "cuda/cuda_device.h"

namespace dstrain {

// The three products of a linear layer y = x W^T.
enum class GroupedProduct {
  forward,          // y = x W_e^T
  backward_input,   // dx = dy W_e
  backward_weight,  // dW_e (+)= dy_e^T x_e
};

// The matrices of a linear layer, or their gradients: a product reads two of them and writes the
// third. Group e has the rows offsets[e] .. offsets[e+1] of x and y, and weight e. Other rows are
// neither read nor written. All have one element type, but dweight is f32. Strides are in elements.
struct GroupedLinear {
  int64_t E = 0, R = 0, O = 0, I = 0;
  const int32_t* offsets_E1 = nullptr;  // on the device; null: one group of all rows
  void* x_RI = nullptr;
  void* y_RO = nullptr;
  void* weight_EOI = nullptr;
  int64_t x_stride = 0, y_stride = 0;
};

// What two blocks that share operands compute at a time: rows x columns of the output.
enum class GroupedTiling { c256x256, c128x512 };

// The tiling that goes least over the edges of the groups. Their sizes are taken as equal.
GroupedTiling choose_grouped_tiling(GroupedProduct product, const GroupedLinear& linear);

// CUTLASS's kernels for forward and backward_input; weight_gradient_hopper.h has the third.
// Thread-compatible. In a build without CUTLASS takes() is always false.
class GroupedGemm {
 public:
  explicit GroupedGemm(const CudaDevice& device);

  // Whether run() computes this product of bf16 matrices: on a Hopper GPU, where no dim is 0 and
  // rows begin at multiples of 16 bytes.
  bool takes(GroupedProduct product, const GroupedLinear& linear) const;

  // What run() wants of scratch memory.
  int64_t scratch_bytes(int64_t groups) const;

  // Asynchronous on the stream. `scratch` is aligned to 256 bytes.
  void run(Stream& stream, GroupedProduct product, const GroupedLinear& linear,
           void* scratch) const;

 private:
  bool available_ = false;
  int num_sms_ = 0;
};

}  // namespace dstrain
