// The two products of a gated feed-forward in which SwiGLU takes part, for a Hopper GPU, each with
// SwiGLU in the same kernel: bf16 matrices, sums in f32. SwiGLU reads the rounded results of the
// product, as if it came after it.
// Legend: E groups (experts), R rows of all groups, D hidden size, I intermediate size.
#pragma once

#include <cstdint>

#include "cuda/cuda_device.h"

namespace dstrain {

// Group e has the rows offsets[e] .. offsets[e+1] and weight e. Other rows are neither read nor
// written. Strides are in elements.
struct HopperFfnCall {
  int64_t E = 0, R = 0, D = 0, I = 0;
  const int32_t* offsets_E1 = nullptr;  // on the device; null: one group of all rows
  void* input_RD = nullptr;             // x, or dy
  const void* weight = nullptr;         // [E, 2I, D], or [E, D, I]
  const float* row_weight_R = nullptr;  // null: 1
  void* gate_up_R2I = nullptr;
  void* h_RI = nullptr;
  int64_t input_stride = 0, gate_up_stride = 0, h_stride = 0;
  // Of down_backward_input() alone:
  void* dgate_up_R2I = nullptr;
  int64_t dgate_up_stride = 0;
  float* drow_weight_R = nullptr;  // may be null
};

// Thread-compatible. Results do not depend on the GPU's number of SMs.
class HopperFfn {
 public:
  explicit HopperFfn(const CudaDevice& device);

  // Whether the products below take this: on a Hopper GPU, where no dim is 0, rows begin at
  // multiples of 16 bytes, and there are at most 512 groups.
  bool takes(const HopperFfnCall& call) const;

  // gate_up = x W_e^T, h = silu(gate) up row_weight. Asynchronous, as the next one.
  void up(Stream& stream, const HopperFfnCall& call) const;

  // From dh = dy W_e, which is not stored: dgate_up, h as up() has it, and drow_weight[r] =
  // sum_i dh silu(gate) up, for which it wants scratch memory.
  void down_backward_input(Stream& stream, const HopperFfnCall& call, float* scratch) const;
  static int64_t scratch_floats(int64_t R, int64_t I);

 private:
  bool available_ = false;
  int num_sms_ = 0;
};

}  // namespace dstrain
