// bf16 is the upper half of an f32. A master value is an f32 in two halves: the nearest bf16, ties
// away from zero, which is what a model computes with, and the lower 16 bits. The upper half was
// rounded by carrying the top bit of the lower one into it; joining takes the carry back. Same bits
// as Ops::split_master and join_master.
#pragma once

#include <bit>
#include <cstdint>

namespace dstrain {

inline float bf16_to_f32(uint16_t bits) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

// To the nearest, ties to even; a NaN stays one.
inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

struct MasterHalves {
  uint16_t high = 0;  // bf16
  uint16_t low = 0;
};

inline MasterHalves split_master(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return {static_cast<uint16_t>((bits + 0x8000u) >> 16), static_cast<uint16_t>(bits)};
}

inline float join_master(MasterHalves halves) {
  const uint32_t high = uint32_t{halves.high} - (halves.low >> 15);
  return std::bit_cast<float>(high << 16 | halves.low);
}

}  // namespace dstrain
