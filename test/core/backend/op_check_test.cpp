// The checks themselves: what must turn them red.
#include "test/support/op_check.h"

#include <cmath>
#include <limits>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"
#include "test/support/device_tensors.h"

namespace dstrain::test {
namespace {

HostTensor ramp(DType dtype, int64_t n, double relative_error = 0) {
  HostTensor x(dtype, {n});
  for (int64_t i = 0; i < n; ++i) x.set(i, (static_cast<double>(i) + 1) * (1 + relative_error));
  return x;
}

}  // namespace

TEST_CASE("compare: within and beyond the tolerance of each type") {
  const HostTensor reference = ramp(DType::f64, 100);
  // sum_length 1 allows (1 + 0) u + u = 2 u.
  CHECK(compare(ramp(DType::f32, 100, 0x1p-24), reference, {}));
  CHECK_FALSE(compare(ramp(DType::f32, 100, 0x1p-22), reference, {}));
  CHECK(compare(ramp(DType::f32, 100, 0x1p-22), reference, {.sum_length = 100}));
  CHECK(compare(ramp(DType::f32, 100, 0x1p-22), reference, {.roundings = 8}));
  CHECK(compare(ramp(DType::f64, 100, 0x1p-53), reference, {}));
  CHECK_FALSE(compare(ramp(DType::f64, 100, 0x1p-50), reference, {}));
  CHECK(compare(ramp(DType::bf16, 100), reference, {}));
  CHECK_FALSE(compare(ramp(DType::bf16, 100, 0x1p-6), reference, {}));
}

TEST_CASE("compare: in a run in bf16 roundings to it count for statistics, too") {
  const HostTensor reference = ramp(DType::f64, 100);
  const Tolerance one{.bf16_roundings = 1};
  CHECK(compare(ramp(DType::bf16, 100, 0x1p-7), reference, one));
  CHECK_FALSE(compare(ramp(DType::bf16, 100, 0x1p-7), reference, {.roundings = 1}));
  CHECK(compare(ramp(DType::f32, 100, 0x1p-9), reference, one, DType::bf16));
  CHECK_FALSE(compare(ramp(DType::f32, 100, 0x1p-9), reference, one, DType::f32));
  CHECK_FALSE(compare(ramp(DType::f32, 100, 0x1p-9), reference, {}, DType::bf16));
}

TEST_CASE("compare: one wrong element among many is found by the largest error") {
  const HostTensor reference = ramp(DType::f64, 30000);
  HostTensor x = ramp(DType::f32, 30000);
  x.set(20, 25);
  const Verdict verdict = compare(x, reference, {.sum_length = 30000});
  CHECK(compare(x, reference, {.sum_length = 10000000}));  // the same error, a wider limit
  CHECK_FALSE(compare(x, reference, {}));
  CHECK_THAT(verdict.text, Catch::Contains("at 20 (25, reference 21)"));
}

TEST_CASE("compare_bits: the first differences are named") {
  const HostTensor x(DType::f32, {3}, {0, 2, std::nan("")});
  CHECK(compare_bits(x, x));
  HostTensor y = x;
  y.set(0, -0.0);
  CHECK_FALSE(compare_bits(y, x));
  y.set(1, 2.5);
  CHECK(compare_bits(y, x).text ==
        "2 of 3 elements differ, 0 is -0 and was expected to be 0, 1 is 2.5 and was expected to be "
        "2");
  CHECK_FALSE(compare_bits(x, HostTensor(DType::f64, {3}, x.values())));
  CHECK_FALSE(compare_bits(x, HostTensor(DType::f32, {2})));
}

TEST_CASE("compare refuses what proves nothing") {
  const HostTensor reference = ramp(DType::f64, 4), zeros(DType::f64, {4});
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    HostTensor x = ramp(DType::f64, 4);
    x.set(2, bad);
    CHECK_FALSE(compare(x, reference, {.roundings = 1e20}));
    CHECK_FALSE(compare(reference, x, {.roundings = 1e20}));
    CHECK_FALSE(compare(x, x, {.roundings = 1e20}));
  }
  CHECK_FALSE(compare(zeros, zeros, {}));
  CHECK(compare(zeros, zeros, {.expect_exact_zero = true}));
  CHECK_FALSE(compare(reference, zeros, {.expect_exact_zero = true}));
  CHECK_FALSE(compare(reference, reference, {.expect_exact_zero = true}));
  CHECK_FALSE(compare(ramp(DType::f64, 3), reference, {}));
}

TEST_CASE("HostTensor: every type keeps what it can hold") {
  for (const DType dtype :
       {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64, DType::u8}) {
    HostTensor x(dtype, {2, 3});
    CHECK(x.get(5) == 0);
    x.set(5, 96);
    CHECK(x.get(5) == 96);
    CHECK(x.view().size(1) == 3);
    CHECK_THROWS(x.get(6));
  }
  // Between 1 and 1 + 2^-7: the tie goes to even, anything above it goes up.
  HostTensor x(DType::bf16, {3}, {1 + 0x1p-8, 1 + 0x1p-8 + 0x1p-30, -(1 + 3 * 0x1p-8)});
  CHECK(x.values() == std::vector<double>{1, 1 + 0x1p-7, -(1 + 0x1p-6)});
}

TEST_CASE("OpCase: both types see the same inputs, outputs begin as NaN") {
  OpCase c(1);
  const Slot x = c.normal({100}), u = c.uniform({100}, 2, 3), i = c.integers({100}, -1, 4);
  const Slot y = c.output({2}), n = c.output(DType::i64, {2});
  const Bound f32 = c.bind(DType::f32), f64 = c.bind(DType::f64);
  CHECK(f32.at(x).values() == f64.at(x).values());
  for (const double value : f64.at(u).values()) CHECK((value >= 2 && value <= 3));
  for (const double value : f64.at(i).values()) CHECK((value >= -1 && value < 4));
  CHECK(std::isnan(f32.at(y).get(1)));
  CHECK(f32.at(n).get(1) == -77);
  CHECK(f32[x].dtype() == DType::f32);
  CHECK(f64[x].dtype() == DType::f64);
  CHECK_FALSE(f64[Slot()].defined());
}

TEST_CASE("OpCase: statistics are f32 beside bf16, and are not rounded to it") {
  OpCase c(1);
  const Slot x = c.values({2}, {1 + 0x1p-10, 2}), s = c.stat(c.values({1}, {1 + 0x1p-10}));
  const Slot i = c.fixed(DType::i32, {1}, {257});
  CHECK(c.has_type_f());
  const Bound bf16 = c.bind(DType::bf16), f64 = c.bind(DType::f64), rounded = c.bind_rounded();
  CHECK(bf16[x].dtype() == DType::bf16);
  CHECK(bf16[s].dtype() == DType::f32);
  CHECK(bf16.at(x).get(0) == 1);
  CHECK(bf16.at(s).get(0) == 1 + 0x1p-10);
  CHECK(f64[s].dtype() == DType::f64);
  CHECK(f64.at(x).get(0) == 1 + 0x1p-10);
  CHECK(rounded[x].dtype() == DType::f64);
  CHECK(rounded.at(x).values() == std::vector<double>{1, 2});
  CHECK(rounded.at(s).get(0) == 1 + 0x1p-10);
  CHECK(rounded.at(i).get(0) == 257);
  CHECK_THROWS(c.stat(i));
}

TEST_CASE("OpCase: scalars are found in the tensors of a run") {
  OpCase c(1);
  StepScalars scalars;
  scalars.grad_norm = 2.5;
  scalars.updates = 77;
  const Slot slot = c.scalars(scalars);
  Bound b = c.bind(DType::f32);
  b.scalars(slot)->grad_scale = 0.5;
  CHECK(b.scalars_at(slot).grad_norm == 2.5);
  CHECK(b.scalars_at(slot).updates == 77);
  CHECK(b.scalars_at(slot).grad_scale == 0.5);
}

TEST_CASE("DeviceTensors: copies come back, and a byte beside them is noticed") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  std::vector<HostTensor> tensors = {ramp(DType::f32, 3), HostTensor(DType::u8, {0}),
                                     ramp(DType::bf16, 500)};
  DeviceTensors memory(*backend, *stream, tensors);
  const Tensor first = memory.views()[0], last = memory.views()[2];
  CHECK(reinterpret_cast<uintptr_t>(last.raw()) % 256 == 0);
  first.data<float>()[2] = 17;
  memory.read_back(tensors);
  CHECK(tensors[0].values() == std::vector<double>{1, 2, 17});
  CHECK(tensors[2].same_bits(ramp(DType::bf16, 500)));

  const auto damage = [&](const Tensor& x, int64_t byte) {
    DeviceTensors fresh(*backend, *stream, tensors);
    const ptrdiff_t at = static_cast<char*>(x.raw()) - static_cast<char*>(first.raw()) + byte;
    static_cast<char*>(fresh.views()[0].raw())[at] = 0;
    fresh.read_back(tensors);
  };
  CHECK_THROWS_WITH(damage(first, 12), Catch::Contains("byte 0 after the end of slot 0, f32[3]"));
  CHECK_THROWS_WITH(damage(first, -1), Catch::Contains("before all tensors"));
  CHECK_THROWS_WITH(damage(last, -1), Catch::Contains("after the end of slot 1"));
  CHECK_THROWS_WITH(damage(last, 1200), Catch::Contains("after the end of slot 2, bf16[500]"));
  CHECK_NOTHROW(damage(last, 998));
}

TEST_CASE("check_gradient: a wrong factor, sign or element turns it red") {
  // y = x^3 elementwise, computed by the bodies themselves.
  OpCase c(2);
  const Slot x = c.normal({20}), y = c.output({20}), dy = c.normal({20}), dx = c.output({20});
  const auto forward = [&](Ops&, Stream&, const Bound& b) {
    for (int i = 0; i < 20; ++i) b[y].data<double>()[i] = std::pow(b[x].data<double>()[i], 3);
  };
  const auto check = [&](double factor, int64_t wrong_element) {
    return check_gradient(c, forward,
                          [&](Ops&, Stream&, const Bound& b) {
                            for (int i = 0; i < 20; ++i) {
                              const double slope = 3 * std::pow(b[x].data<double>()[i], 2);
                              b[dx].data<double>()[i] = factor * slope * b[dy].data<double>()[i];
                            }
                            if (wrong_element >= 0) b[dx].data<double>()[wrong_element] += 1e-5;
                          },
                          {{y, dy}}, {{x, dx}});
  };
  CHECK(check(1, -1));
  CHECK_FALSE(check(1.00001, -1));
  CHECK_FALSE(check(-1, -1));
  CHECK_FALSE(check(1, 7));
}

}  // namespace dstrain::test
