// Compression against naive references: a stable sort per block for top-k, a loop in double for
// int8. Payloads are judged by what the receiver reads from them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Floats = std::vector<float>;

Floats random_floats(int64_t n, uint32_t seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  Floats x(static_cast<size_t>(n));
  for (float& value : x) value = normal(random);
  return x;
}

uint32_t bits(float value) {
  return std::bit_cast<uint32_t>(value);
}
bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

float round_to_bf16(float value) {
  const uint32_t u = bits(value), rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return std::bit_cast<float>(rounded & 0xffff0000u);
}

Floats floats_of(const HostTensor& x) {
  Floats out;
  for (const double value : x.values()) out.push_back(static_cast<float>(value));
  return out;
}

// The operations of the device under test, on vectors.
struct Device {
  int threads = 1;

  static void compress(Ops& ops, Stream& s, const Tensor& grad, const TopkFormat& format,
                       const Tensor& residual, const Tensor& payload) {
    ops.topk_compress(s, grad, format, residual, payload);
  }
  static void compress(Ops& ops, Stream& s, const Tensor& grad, const Int8Format& format,
                       const Tensor& residual, const Tensor& payload) {
    ops.int8_compress(s, grad, format, residual, payload);
  }
  static void sum(Ops& ops, Stream& s, const Tensor& payload, const TopkFormat& format,
                  Accumulate accumulate, const Tensor& out) {
    ops.topk_sum(s, payload, format, accumulate, out);
  }
  static void sum(Ops& ops, Stream& s, const Tensor& payload, const Int8Format& format,
                  Accumulate accumulate, const Tensor& out) {
    ops.int8_sum(s, payload, format, accumulate, out);
  }

  // Payloads of `pieces` pieces. Updates the residual, which may be empty.
  template <class Format>
  std::vector<uint8_t> compress(const Format& format, int64_t pieces, const Floats& grad,
                                Floats& residual) const {
    const int64_t n = std::ssize(grad) / pieces, bytes = format.payload_bytes(n);
    OpCase c(1);
    const auto slot_of = [&](const Floats& x) {
      return c.fixed(DType::f32, {pieces, n}, std::vector<double>(x.begin(), x.end()));
    };
    const Slot v = slot_of(grad), kept = residual.empty() ? Slot{} : slot_of(residual);
    const Slot payload = c.fixed(DType::u8, {pieces, bytes},
                                 std::vector<double>(static_cast<size_t>(pieces * bytes), 0xee));
    const Bound b = run_op(c, DType::f32, threads, [&](Ops& ops, Stream& s, const Bound& t) {
      compress(ops, s, t[v], format, t[kept], t[payload]);
    });
    if (!residual.empty()) residual = floats_of(b.at(kept));
    std::vector<uint8_t> out;
    for (const double byte : b.at(payload).values()) out.push_back(static_cast<uint8_t>(byte));
    return out;
  }
  // What a receiver reads: the sum over pieces, after what it has already, if that is not empty.
  template <class Format>
  Floats sum(const Format& format, int64_t pieces, int64_t n, const std::vector<uint8_t>& received,
             const Floats& before = {}) const {
    OpCase c(1);
    const Slot payload = c.fixed(DType::u8, {pieces, format.payload_bytes(n)},
                                 std::vector<double>(received.begin(), received.end()));
    const Slot out = before.empty() ? c.output(DType::f32, {n})
                                    : c.fixed(DType::f32, {n}, {before.begin(), before.end()});
    const Accumulate accumulate = before.empty() ? Accumulate::overwrite : Accumulate::add;
    return floats_of(run_op(c, DType::f32, threads, [&](Ops& ops, Stream& s, const Bound& t) {
                       sum(ops, s, t[payload], format, accumulate, t[out]);
                     }).at(out));
  }
  template <class Format>
  Floats sent(const Format& format, const Floats& grad, Floats& residual) const {
    return sum(format, 1, std::ssize(grad), compress(format, 1, grad, residual));
  }
};

// Of each block the elements of largest magnitude by a stable sort, in ascending order of index.
Floats naive_topk(const Floats& v, const TopkFormat& format) {
  Floats sent(v.size(), 0.0f);
  const auto n = static_cast<int64_t>(v.size());
  for (int64_t begin = 0; begin < n; begin += format.block) {
    const int64_t count = std::min(format.block, n - begin);
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), begin);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::fabs(v[static_cast<size_t>(a)]) > std::fabs(v[static_cast<size_t>(b)]);
    });
    const auto kept = static_cast<int64_t>(
        std::max(1.0, std::floor(format.density * static_cast<double>(count) + 0.5)));
    for (int64_t j = 0; j < kept; ++j) {
      const auto i = static_cast<size_t>(order[static_cast<size_t>(j)]);
      sent[i] = format.values == DType::bf16 ? round_to_bf16(v[i]) : v[i];
    }
  }
  return sent;
}

}  // namespace

TEST_CASE("top-k sends the largest of each block, and the residual keeps the rest exactly",
          "[op][large]") {
  const int64_t n = GENERATE(1, 5, 63, 64, 65, 1000, 20011);
  const int64_t block = GENERATE(1, 64, 4096, 65536);
  const double density = GENERATE(0.001, 0.05, 0.5, 1.0);
  const DType values = GENERATE(DType::f32, DType::bf16);
  INFO(n << " elements, block " << block << ", density " << density << ", " << dtype_name(values));
  const TopkFormat format{block, density, values};
  const Floats grad = random_floats(n, 1), before = random_floats(n, 2, 0.3f);
  Floats v(grad.size());
  for (size_t i = 0; i < v.size(); ++i) v[i] = grad[i] + before[i];

  const Device device;
  Floats residual = before;
  const Floats sent = device.sent(format, grad, residual);
  CHECK(sent == naive_topk(v, format));
  for (size_t i = 0; i < v.size(); ++i)
    if (residual[i] != v[i] - sent[i]) FAIL("residual of element " << i);

  Floats none;
  CHECK(device.sent(format, v, none) == sent);
}

TEST_CASE("top-k: among equal magnitudes the lower index goes first", "[op]") {
  const TopkFormat format{8, 0.5, DType::f32};
  const Device device;
  Floats none;
  CHECK(device.sent(format, {1, -1, 1, 2, -1, 1, 1, -2}, none) == Floats{1, -1, 0, 2, 0, 0, 0, -2});
  CHECK(device.sent(format, Floats(8, -3.0f), none) == Floats{-3, -3, -3, -3, 0, 0, 0, 0});
  CHECK(device.sent(format, Floats(8, 0.0f), none) == Floats(8, 0.0f));
  // Neighbours in the same bin of a coarse histogram, and magnitudes that differ in the last bit.
  const float above = std::nextafter(1.0f, 2.0f);
  CHECK(device.sent(format, {1, above, 1, above, 1, above, 1, above}, none) ==
        Floats{0, above, 0, above, 0, above, 0, above});
  const float tiny = std::numeric_limits<float>::denorm_min();
  CHECK(device.sent(format, {0, tiny, 0, 0, 0, 0, 0, -2 * tiny}, none) ==
        Floats{0, tiny, 0, 0, 0, 0, 0, -2 * tiny});
}

TEST_CASE("top-k of everything in f32 gives the bits of the sum in the same order", "[op]") {
  const int64_t n = 3001, pieces = GENERATE(1, 2, 3, 4);
  Floats grad = random_floats(n * pieces, 3);
  for (int64_t p = 0; p < pieces; ++p) grad[static_cast<size_t>(p * n + 7)] = -0.0f;
  const TopkFormat format{1024, 1.0, DType::f32};
  CHECK(format.lossless());
  CHECK_FALSE(TopkFormat{1024, 0.999, DType::f32}.lossless());
  CHECK_FALSE(TopkFormat{1024, 1.0, DType::bf16}.lossless());
  const Device device;
  Floats none;
  const Floats sum = device.sum(format, pieces, n, device.compress(format, pieces, grad, none));
  Floats expected(grad.begin(), grad.begin() + n);
  for (int64_t p = 1; p < pieces; ++p)
    for (int64_t i = 0; i < n; ++i)
      expected[static_cast<size_t>(i)] += grad[static_cast<size_t>(p * n + i)];
  CHECK(same_bits(sum, expected));
}

TEST_CASE("int8 codes are within half a step, and the residual keeps the rest exactly", "[op]") {
  const int64_t n = GENERATE(1, 255, 256, 257, 30000);
  const int64_t block = GENERATE(1, 256, 1000);
  const float scale = GENERATE(1.0f, 1e-30f, 1e-43f, 1e36f);
  INFO(n << " elements, block " << block << ", scale " << scale);
  const Int8Format format{block};
  const Floats grad = random_floats(n, 4, scale), before = random_floats(n, 5, scale / 4);
  const Device device;
  Floats residual = before;
  const Floats sent = device.sent(format, grad, residual);
  for (int64_t begin = 0; begin < n; begin += block) {
    float largest = 0;
    const auto end = static_cast<size_t>(std::min(begin + block, n));
    for (auto i = static_cast<size_t>(begin); i < end; ++i)
      largest = std::max(largest, std::fabs(grad[i] + before[i]));
    // Half a step; the scale is cut to 16 bits, or to what is left of them among the smallest
    // numbers.
    const double limit = largest / 254.0 + largest / 32768.0 + 127 * 256 * 1.5e-45;
    for (auto i = static_cast<size_t>(begin); i < end; ++i) {
      const float v = grad[i] + before[i];
      if (!(std::fabs(static_cast<double>(v) - sent[i]) <= limit))
        FAIL("element " << i << " of " << v << " was sent as " << sent[i]);
      if (residual[i] != v - sent[i]) FAIL("residual of element " << i);
    }
  }
}

TEST_CASE("int8: products of codes and scales are exact, so that fused sums have the same bits",
          "[op]") {
  const Int8Format format{256};
  const Device device;
  Floats none;
  const std::vector<uint8_t> payload = device.compress(format, 1, random_floats(2560, 13), none);
  for (size_t block = 0; block < 10; ++block) {
    float scale = 0;
    std::memcpy(&scale, payload.data() + 4 * block, 4);
    CHECK(static_cast<double>(127.0f * scale) == 127.0 * static_cast<double>(scale));
    CHECK(static_cast<double>(85.0f * scale) == 85.0 * static_cast<double>(scale));
  }
}

TEST_CASE("compression: padding of payloads is zero", "[op]") {
  const Device device;
  Floats none;
  const std::vector<uint8_t> int8 = device.compress(Int8Format{256}, 1, Floats(257, 1.0f), none);
  CHECK(std::vector<uint8_t>(int8.end() - 4, int8.end()) == std::vector<uint8_t>{127, 0, 0, 0});
  const TopkFormat format{64, 0.01, DType::f32};
  const std::vector<uint8_t> topk = device.compress(format, 1, Floats(64, 1.0f), none);
  CHECK(topk.size() == 8);
  CHECK(std::vector<uint8_t>(topk.end() - 4, topk.end()) == std::vector<uint8_t>(4, 0));
}

TEST_CASE("int8: sums run in ascending order of pieces", "[op]") {
  const int64_t n = 700, pieces = 3;
  const Int8Format format{256};
  const Floats grad = random_floats(n * pieces, 6);
  const Device device;
  Floats none;
  Floats expected;
  for (int64_t p = 0; p < pieces; ++p) {
    const Floats sent =
        device.sent(format, Floats(grad.begin() + p * n, grad.begin() + (p + 1) * n), none);
    if (p == 0) expected = sent;
    for (size_t i = 0; p > 0 && i < expected.size(); ++i) expected[i] += sent[i];
  }
  CHECK(same_bits(device.sum(format, pieces, n, device.compress(format, pieces, grad, none)),
                  expected));
}

TEMPLATE_TEST_CASE("compression: a sum that begins with what is there already", "[op]", TopkFormat,
                   Int8Format) {
  // With the GPU, blocks in its shared memory and larger ones; rows that are not aligned.
  const int64_t n = GENERATE(1, 257, 25000), pieces = GENERATE(0, 1, 5);
  TestType format;
  format.block = GENERATE(256, 8192, 20000);
  const Floats before = random_floats(n, 14), grad = random_floats(n * pieces, 15);
  const Device device;
  Floats expected = before;
  for (int64_t p = 0; p < pieces; ++p) {
    Floats none;
    const Floats sent =
        device.sent(format, Floats(grad.begin() + p * n, grad.begin() + (p + 1) * n), none);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += sent[i];
  }
  Floats none;
  const std::vector<uint8_t> payload =
      pieces == 0 ? std::vector<uint8_t>() : device.compress(format, pieces, grad, none);
  CHECK(same_bits(device.sum(format, pieces, n, payload, before), expected));
}

TEMPLATE_TEST_CASE("what is sent and what is kept add up to the gradients over many steps",
                   "[op][long]", TopkFormat, Int8Format) {
  const int64_t n = 5000;
  TestType format;
  format.block = 1000;
  const Device device;
  Floats residual(n, 0.0f);
  std::vector<double> sent(n, 0.0), wanted(n, 0.0), largest(n, 0.0);
  for (uint32_t step = 0; step < 200; ++step) {
    const Floats grad = random_floats(n, 100 + step);
    const Floats now = device.sent(format, grad, residual);
    for (size_t i = 0; i < n; ++i) {
      sent[i] += now[i];
      wanted[i] += grad[i];
      largest[i] = std::max(largest[i], std::fabs(static_cast<double>(residual[i])));
    }
  }
  // One rounding of grad + residual per step.
  for (size_t i = 0; i < n; ++i) {
    const double limit = 200 * 6e-8 * (largest[i] + 5);
    if (!(std::fabs(sent[i] + residual[i] - wanted[i]) <= limit)) FAIL("element " << i);
  }
}

TEST_CASE("payloads are as small as promised", "[ops]") {
  const int64_t n = 1 << 20;
  const auto saved = [&](int64_t bytes) { return 1 - static_cast<double>(bytes) / (4.0 * n); };
  CHECK(saved(TopkFormat{8192, 0.05, DType::bf16}.payload_bytes(n)) >= 0.945);
  CHECK(saved(TopkFormat{2048, 0.05, DType::bf16}.payload_bytes(n)) >= 0.945);
  CHECK(saved(TopkFormat{8192, 0.05, DType::f32}.payload_bytes(n)) >= 0.92);
  CHECK(saved(Int8Format{256}.payload_bytes(n)) >= 0.74);
  CHECK(TopkFormat{8192, 0.05, DType::bf16}.payload_bytes(8192) == 410 * 4);
  CHECK(Int8Format{256}.payload_bytes(257) == 268);  // 257 codes, 2 scales, 3 bytes of padding
  CHECK(TopkFormat{}.payload_bytes(0) == 0);
  CHECK(Int8Format{}.payload_bytes(0) == 0);
}

TEST_CASE("top-k: NaN and infinity are sent first, residuals stay finite", "[op]") {
  const DType values = GENERATE(DType::f32, DType::bf16);
  const float bad = GENERATE(as<float>{}, kInf, -kInf, kNan, -kNan);
  const TopkFormat format{100, 0.02, values};
  Floats grad = random_floats(300, 7), residual = random_floats(300, 8);
  grad[150] = bad;
  grad[3] = 1e30f;
  const Floats before = residual;
  const Device device;
  const Floats sent = device.sent(format, grad, residual);
  CHECK(std::isnan(sent[150]) == std::isnan(bad));
  CHECK(std::isinf(sent[150]) == std::isinf(bad));
  CHECK((std::isnan(bad) || std::signbit(sent[150]) == std::signbit(bad)));  // sums of a GPU have one NaN
  CHECK(residual[150] == before[150]);
  CHECK(std::all_of(residual.begin(), residual.end(), [](float r) { return std::isfinite(r); }));

  // More of them than are sent; and a sum that overflows where both terms are finite.
  grad.assign(300, bad);
  residual = before;
  CHECK(std::count_if(sent.begin(), sent.end(), [](float s) { return !std::isfinite(s); }) == 1);
  const Floats all = device.sent(format, grad, residual);
  CHECK(std::count_if(all.begin(), all.end(), [](float s) { return !std::isfinite(s); }) == 6);
  CHECK(same_bits(residual, before));
  grad.assign(300, 3e38f);
  residual.assign(300, 3e38f);
  CHECK(std::isinf(device.sent(format, grad, residual)[0]));
  CHECK(residual == Floats(300, 3e38f));
}

TEST_CASE("top-k in bf16: the largest finite numbers stay finite", "[op]") {
  const float largest = std::numeric_limits<float>::max();
  const Device device;
  Floats residual(2, 0.0f);
  const Floats sent = device.sent(TopkFormat{2, 1.0, DType::bf16}, {largest, -largest}, residual);
  CHECK(std::isfinite(sent[0]));
  CHECK(sent[0] == -sent[1]);
  CHECK(residual[0] == largest - sent[0]);
}

TEST_CASE("int8: a block with NaN or infinity becomes NaN, residuals stay finite", "[op]") {
  const float bad = GENERATE(as<float>{}, kInf, -kInf, kNan);
  const Int8Format format{256};
  Floats grad = random_floats(600, 9), residual = random_floats(600, 10);
  grad[300] = bad;
  const Floats before = residual;
  const Device device;
  const Floats sent = device.sent(format, grad, residual);
  for (size_t i = 0; i < 600; ++i) {
    if (std::isnan(sent[i]) != (i >= 256 && i < 512)) FAIL("element " << i);
    if (!std::isfinite(residual[i])) FAIL("residual of element " << i);
  }
  CHECK(residual[300] == before[300]);
}

TEMPLATE_TEST_CASE("compression: the same bits with any number of threads", "[op]", TopkFormat,
                   Int8Format) {
  const int64_t n = 100003, pieces = 3;
  TestType format;
  const Floats grad = random_floats(n * pieces, 11), before = random_floats(n * pieces, 12);
  std::vector<uint8_t> first;
  Floats first_residual, first_sum;
  for (const int threads : {1, 2, 3}) {
    const Device device{threads};
    Floats residual = before;
    const std::vector<uint8_t> payload = device.compress(format, pieces, grad, residual);
    const Floats sum = device.sum(format, pieces, n, payload);
    if (threads == 1) {
      first = payload;
      first_residual = residual;
      first_sum = sum;
    }
    CHECK(payload == first);
    CHECK(same_bits(residual, first_residual));
    CHECK(same_bits(sum, first_sum));
  }
}

TEST_CASE("compression: empty pieces are legal", "[op]") {
  const Device device;
  Floats none;
  CHECK(device.sent(TopkFormat{}, {}, none).empty());
  CHECK(device.sent(Int8Format{}, {}, none).empty());
}

TEST_CASE("compression: wrong sizes are refused", "[ops]") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  Ops& ops = backend->ops();
  Floats grad(10);
  std::vector<uint8_t> payload(100);
  const Tensor grad_1N(grad.data(), DType::f32, {1, 10});
  const Tensor payload_1B(payload.data(), DType::u8, {1, 100});
  CHECK_THROWS_WITH(ops.topk_compress(*stream, grad_1N, TopkFormat{}, Tensor(), payload_1B),
                    Catch::Contains("topk_compress: payload_PB"));
  CHECK_THROWS_WITH(ops.topk_compress(*stream, grad_1N, TopkFormat{70000}, Tensor(), payload_1B),
                    Catch::Contains("a block of 70000 elements"));
  CHECK_THROWS_WITH(ops.int8_sum(*stream, payload_1B, Int8Format{}, Accumulate::overwrite,
                                 Tensor(grad.data(), DType::f32, {10})),
                    Catch::Contains("int8_sum: payload_PB"));
}

TEST_CASE("clear_if_skipped", "[op]") {
  OpCase c(1);
  const Slot x = c.fixed(DType::f32, {3}, {1, kNan, 3});
  const Slot applied = c.scalars({}), skipped = c.scalars(skipped_step());
  const auto clear = [&](Slot scalars) {
    return run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
      ops.clear_if_skipped(s, t.scalars(scalars), t[x]);
    });
  };
  CHECK(clear(applied).at(x).get(2) == 3);
  CHECK(clear(skipped).at(x).values() == std::vector<double>(3));
}

}  // namespace dstrain::test
