// What the compressions of gradients share: magnitudes as integers, and checks of arguments. P pieces of N elements.
#pragma once

#include <string>

#include "core/backend/compressed_format.h"
#include "core/backend/expect.h"
#include "cuda/kernel.cuh"

namespace dstrain {

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

// In the order of the absolute values; NaN is above infinity.
__device__ __forceinline__ uint32_t magnitude_of(float value) { return __float_as_uint(value) & kMagnitude; }

inline void expect_pieces(const std::string& op, const Tensor& grad_PN, const Tensor& residual_PN,
                          const Tensor& payload_PB, int64_t payload_bytes) {
  const int64_t P = grad_PN.size(0), N = grad_PN.size(1);
  expect(grad_PN, (op + ": grad_PN").c_str(), DType::f32, {P, N});
  if (residual_PN.defined()) expect(residual_PN, (op + ": residual_PN").c_str(), DType::f32, {P, N});
  expect(payload_PB, (op + ": payload_PB").c_str(), DType::u8, {P, payload_bytes});
}

inline void expect_sum(const std::string& op, const Tensor& payload_PB, const Tensor& sum_N, int64_t payload_bytes) {
  expect(payload_PB, (op + ": payload_PB").c_str(), DType::u8, {payload_PB.size(0), payload_bytes});
  expect(sum_N, (op + ": sum_N").c_str(), DType::f32, {sum_N.numel()});
}

inline void expect_block(const char* op, int64_t block) {
  DSTRAIN_CHECK(block > 0 && block <= TopkFormat::kMaxBlock,
                std::string(op) + ": a block of " + std::to_string(block) + " elements; at most " +
                    std::to_string(TopkFormat::kMaxBlock) + " are possible");
}

}  // namespace dstrain
