// Which elements top-k chooses, bit for bit against a stable sort of each block: magnitudes that
// differ in few bits, ties, zeros, denormals, NaN and infinity, and blocks of odd lengths.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<uint8_t>;

uint32_t magnitude_of(float value) {
  return std::bit_cast<uint32_t>(value) & 0x7fffffffu;
}

// f32 values of all blocks, then their indices.
Bytes sorted_payload(const Floats& v, const TopkFormat& format) {
  const auto n = static_cast<int64_t>(v.size());
  Floats values;
  std::vector<uint16_t> indices;
  for (int64_t begin = 0; begin < n; begin += format.block) {
    const float* const block = v.data() + begin;
    const int64_t count = std::min(format.block, n - begin);
    std::vector<uint16_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), uint16_t{0});
    std::stable_sort(order.begin(), order.end(), [&](uint16_t a, uint16_t b) {
      return magnitude_of(block[a]) > magnitude_of(block[b]);
    });
    order.resize(static_cast<size_t>(format.kept(count)));
    std::sort(order.begin(), order.end());
    for (const uint16_t i : order) values.push_back(block[i]);
    indices.insert(indices.end(), order.begin(), order.end());
  }
  Bytes payload(static_cast<size_t>(format.payload_bytes(n)), uint8_t{0});
  std::memcpy(payload.data(), values.data(), 4 * values.size());
  std::memcpy(payload.data() + 4 * values.size(), indices.data(), 2 * indices.size());
  return payload;
}

Bytes sent_payload(const Floats& v, const TopkFormat& format) {
  const auto n = static_cast<int64_t>(v.size());
  const int64_t bytes = format.payload_bytes(n);
  OpCase c(1);
  const Slot grad = c.fixed(DType::f32, {1, n}, std::vector<double>(v.begin(), v.end()));
  const Slot payload =
      c.fixed(DType::u8, {1, bytes}, std::vector<double>(static_cast<size_t>(bytes), 0xee));
  const Bound b = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.topk_compress(s, t[grad], format, Tensor(), t[payload]);
  });
  Bytes out;
  for (const double byte : b.at(payload).values()) out.push_back(static_cast<uint8_t>(byte));
  return out;
}

// Elements of one kind: element(random bits, index).
struct Kind {
  const char* name;
  std::function<float(uint32_t, size_t)> element;
};

float from_bits(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
float with_sign(uint32_t random, uint32_t magnitude) {
  return from_bits((random & 0x80000000u) | magnitude);
}

std::vector<Kind> kinds() {
  constexpr uint32_t kOne = 0x3f800000u, kInfinity = 0x7f800000u, kQuiet = 0x7fc00000u;
  return {
      {"any finite number", [](uint32_t r, size_t) { return with_sign(r, r % kInfinity); }},
      {"within a factor of two",
       [](uint32_t r, size_t) { return with_sign(r, kOne + r % (1u << 23)); }},
      {"the lowest 16 bits differ",
       [](uint32_t r, size_t) { return with_sign(r, kOne + r % 65536); }},
      {"two neighbours", [](uint32_t r, size_t) { return with_sign(r, kOne + r % 2); }},
      {"neighbours around a carry",
       [](uint32_t r, size_t) { return with_sign(r, kOne + 0x7ffe + r % 4); }},
      {"bf16", [](uint32_t r, size_t) { return with_sign(r, kOne + r % 64 * 65536); }},
      {"all equal", [](uint32_t r, size_t) { return with_sign(r, kOne); }},
      {"all zero", [](uint32_t r, size_t) { return with_sign(r, 0); }},
      {"one in a hundred is not zero",
       [](uint32_t r, size_t) { return r % 100 == 0 ? with_sign(r, kOne + r / 128 % 8) : 0.0f; }},
      {"denormal", [](uint32_t r, size_t) { return with_sign(r, r % (1u << 23)); }},
      {"few denormal bits, and zeros", [](uint32_t r, size_t) { return with_sign(r, r % 16); }},
      {"all infinite", [](uint32_t r, size_t) { return with_sign(r, kInfinity); }},
      {"NaN with payloads", [](uint32_t r, size_t) { return with_sign(r, kQuiet + r % 65536); }},
      {"the largest NaN", [](uint32_t r, size_t) { return with_sign(r, 0x7fffffffu); }},
      {"finite numbers with some infinity and NaN",
       [](uint32_t r, size_t) {
         return r % 37 == 0   ? with_sign(r, kInfinity)
                : r % 41 == 0 ? with_sign(r, kQuiet + r % 8)
                              : with_sign(r, r % kOne);
       }},
      {"ascending", [](uint32_t, size_t i) { return static_cast<float>(i); }},
      {"descending", [](uint32_t, size_t i) { return -1.0f / static_cast<float>(i + 1); }},
  };
}

}  // namespace

TEST_CASE("top-k chooses what a stable sort chooses, to the bit", "[op]") {
  struct Shape {
    int64_t n, block;
  };
  const auto [n, block] =
      GENERATE(Shape{1, 64}, Shape{63, 64}, Shape{200, 65}, Shape{2 * 8192 + 411, 8192},
               Shape{5000, 8192}, Shape{65536 + 1, 65536});
  const double density = GENERATE(0.001, 0.05, 0.5, 0.97);
  std::mt19937 random(7);
  for (const Kind& kind : kinds()) {
    INFO(kind.name << ": " << n << " elements, block " << block << ", density " << density);
    Floats v(static_cast<size_t>(n));
    for (size_t i = 0; i < v.size(); ++i) v[i] = kind.element(static_cast<uint32_t>(random()), i);
    const TopkFormat format{block, density, DType::f32};
    CHECK(sent_payload(v, format) == sorted_payload(v, format));
  }
}

}  // namespace dstrain::test
