// How compressed gradients lie in memory. A piece of n elements is cut into blocks, the last of
// which may be shorter. The size of a payload depends on n alone, so no counts travel; it is a
// multiple of 4 bytes, padding is zero.
//
//   top-k:  values of all blocks (bf16 or f32), then indices of all blocks (u16, within the block,
//           ascending): of each block the elements of largest magnitude
//   int8:   a scale per block (f32), then a code per element; element = code * scale
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/tensor/tensor.h"

namespace dstrain {

inline int64_t padded_payload(int64_t bytes) {
  return (bytes + 3) / 4 * 4;
}

struct TopkFormat {
  static constexpr int64_t kMaxBlock = 65536;  // indices have 16 bits

  int64_t block = 8192;
  double density = 0.05;
  DType values = DType::bf16;  // or f32

  // Elements sent of a block that has `elements`: the nearest number to the density, at least one.
  int64_t kept(int64_t elements) const {
    const auto nearest = static_cast<int64_t>(density * static_cast<double>(elements) + 0.5);
    return std::clamp<int64_t>(nearest, std::min<int64_t>(1, elements), elements);
  }
  // Of a piece.
  int64_t kept_total(int64_t n) const { return n / block * kept(block) + kept(n % block); }
  int64_t payload_bytes(int64_t n) const {
    return padded_payload(kept_total(n) * (dtype_bytes(values) + 2));
  }
  // Nothing is lost, and no residual needed.
  bool lossless() const { return values == DType::f32 && kept(block) == block; }
};

struct Int8Format {
  int64_t block = 256;

  int64_t blocks(int64_t n) const { return (n + block - 1) / block; }
  int64_t payload_bytes(int64_t n) const { return padded_payload(blocks(n) * 4 + n); }
};

}  // namespace dstrain
