#include "core/base/bf16.h"

#include <cmath>
#include <limits>

#include "test/support/catch.h"

namespace dstrain {
namespace {

float of_bits(uint32_t bits) {
  return std::bit_cast<float>(bits);
}

}  // namespace

TEST_CASE("bf16: a master value comes back with every bit, whatever it is", "[base]") {
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 4093) {
    const float value = of_bits(static_cast<uint32_t>(bits));
    const float back = join_master(split_master(value));
    if (std::bit_cast<uint32_t>(back) != bits) FAIL("the bits " << bits << " are lost");
  }
  for (const uint32_t bits :
       {0x00000000u, 0x80000000u, 0x3f808000u, 0x3f807fffu, 0x3f7fffffu, 0x7f7fffffu, 0x7f800000u,
        0xff800000u, 0x7fc00001u, 0x7fffffffu, 0x00000001u, 0x00008000u})
    CHECK(std::bit_cast<uint32_t>(join_master(split_master(of_bits(bits)))) == bits);
}

TEST_CASE("bf16: the upper half of a master value is the nearest bf16, ties away from zero",
          "[base]") {
  for (uint32_t bits = 0x30000000u; bits < 0x50000000u; bits += 1009) {
    const float value = of_bits(bits), nearest = bf16_to_f32(split_master(value).high);
    const float step = bf16_to_f32(static_cast<uint16_t>((bits >> 16) + 1)) -
                       bf16_to_f32(static_cast<uint16_t>(bits >> 16));
    if (2 * std::abs(nearest - value) > step) FAIL(value << " becomes " << nearest);
  }
  CHECK(split_master(of_bits(0x3f808000u)).high == 0x3f81);
  CHECK(split_master(of_bits(0xbf818000u)).high == 0xbf82);
}

TEST_CASE("bf16: rounding to nearest takes ties to even, keeps infinity and NaN", "[base]") {
  CHECK(f32_to_bf16(of_bits(0x3f808000u)) == 0x3f80);
  CHECK(f32_to_bf16(of_bits(0x3f818000u)) == 0x3f82);
  CHECK(f32_to_bf16(of_bits(0x3f808001u)) == 0x3f81);
  CHECK(f32_to_bf16(std::numeric_limits<float>::infinity()) == 0x7f80);
  CHECK(std::isnan(bf16_to_f32(f32_to_bf16(of_bits(0x7f800001u)))));
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const float value = bf16_to_f32(static_cast<uint16_t>(bits));
    if (!std::isnan(value) && f32_to_bf16(value) != bits) FAIL("the bits " << bits << " are lost");
  }
}

}  // namespace dstrain
