#include "core/engine/parameter_io.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"

namespace dstrain {

TEST_CASE("parameter io: f32 goes through unchanged, f64 by rounding", "[engine]") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  const float denormal = std::numeric_limits<float>::denorm_min();
  const std::vector<float> values = {
      0.1f, -0.0f, 3e38f, denormal, std::numeric_limits<float>::infinity(), -7.0f};
  std::vector<float> narrow(6);
  write_tensor(*backend, *stream, values, Tensor(narrow.data(), DType::f32, {2, 3}));
  CHECK(narrow == values);
  CHECK(std::signbit(narrow[1]));
  CHECK(read_tensor(*backend, *stream, Tensor(narrow.data(), DType::f32, {6})) == values);

  std::vector<double> wide(6);
  write_tensor(*backend, *stream, values, Tensor(wide.data(), DType::f64, {6}));
  CHECK(wide[0] == static_cast<double>(0.1f));
  CHECK(read_tensor(*backend, *stream, Tensor(wide.data(), DType::f64, {6})) == values);
  wide[5] = 1.0 + 1e-12;
  CHECK(read_tensor(*backend, *stream, Tensor(wide.data(), DType::f64, {6}))[5] == 1.0f);
}

TEST_CASE("parameter io: bf16 is read by widening, written by rounding to even", "[engine]") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  std::vector<uint16_t> bits = {0x3f80, 0xc000, 0x7f80, 0x3eab};
  const std::vector<float> wide = {1.0f, -2.0f, std::numeric_limits<float>::infinity(),
                                   0.333984375f};
  CHECK(read_tensor(*backend, *stream, Tensor(bits.data(), DType::bf16, {4})) == wide);
  const std::vector<float> ties = {1.00390625f, 1.01171875f, -0.0f, wide[2]};
  write_tensor(*backend, *stream, ties, Tensor(bits.data(), DType::bf16, {4}));
  CHECK(bits == std::vector<uint16_t>{0x3f80, 0x3f82, 0x8000, 0x7f80});
}

TEST_CASE("parameter io: sizes and types that do not fit are refused", "[engine]") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  std::vector<float> memory(6);
  const Tensor matrix(memory.data(), DType::f32, {2, 3});
  CHECK_THROWS(write_tensor(*backend, *stream, std::vector<float>(5), matrix));
  CHECK_THROWS(write_tensor(*backend, *stream, std::vector<float>(4), matrix.columns(0, 2)));
  CHECK_THROWS(read_tensor(*backend, *stream, matrix.columns(0, 2)));
  CHECK_THROWS(write_tensor(*backend, *stream, std::vector<float>(3),
                            Tensor(memory.data(), DType::i32, {3})));
  CHECK_THROWS(read_tensor(*backend, *stream, Tensor(memory.data(), DType::i32, {3})));
}

}  // namespace dstrain
