// What AdamW does with bf16 on a GPU alone: parameters that are halves of their f32 master values,
// and moments that are rounded by chance.
#include <cmath>
#include <string>
#include <vector>

#include "test/support/catch.h"
#include "test/support/cuda_device.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

constexpr AdamWParams kParams{0.9, 0.95, 1e-8, 0.1};

StepScalars scalars_of_step(int64_t updates) {
  StepScalars scalars;
  scalars.in.lr = 3e-3;
  scalars.bias_correction1 = 1 - std::pow(kParams.beta1, updates);
  scalars.bias_correction2 = 1 - std::pow(kParams.beta2, updates);
  scalars.grad_scale = 0.7;
  scalars.updates = updates;
  return scalars;
}

TEST_CASE("cuda: adamw of a bf16 parameter and its lower half is that of the f32 master value",
          "[cuda]") {
  if (skipped_without_gpu()) return;
  const int64_t n = GENERATE(1, 37, 100003);
  OpCase c(75);
  const Slot grad = c.stat(c.normal({n}, 0.01)), master = c.stat(c.normal({n}));
  const Slot m = c.stat(c.normal({n}, 0.01)), v = c.stat(c.uniform({n}, 1e-6, 1e-4));
  const Slot m2 = c.stat(c.output({n})), v2 = c.stat(c.output({n})), joined = c.stat(c.output({n}));
  const Slot param = c.output(DType::bf16, {n});
  const Slot low = c.fixed(DType::u16, {n}, std::vector<double>(static_cast<size_t>(n), 1));
  const Slot step = c.scalars(scalars_of_step(5)), skipped = c.scalars(skipped_step());
  const Bound b = run_op_on_gpu(c, DType::f32, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.split_master(s, t[master], t[param], t[low]);
    ops.convert(s, t[m], t[m2]);
    ops.convert(s, t[v], t[v2]);
    for (int i = 0; i < 3; ++i) {
      for (const Slot scalars : {step, skipped}) {
        ops.adamw(s, kParams, t.scalars(scalars), t[grad], t[master], {}, t[m], t[v]);
        ops.adamw(s, kParams, t.scalars(scalars), t[grad], t[param], t[low], t[m2], t[v2]);
      }
    }
    ops.join_master(s, t[param], t[low], t[joined]);
  });
  CHECK(b.at(joined).same_bits(b.at(master)));
  CHECK(b.at(m2).same_bits(b.at(m)));
  CHECK(b.at(v2).same_bits(b.at(v)));
  CHECK_FALSE(b.at(master).same_bits(c.bind(DType::f32).at(master)));
}

TEST_CASE("cuda: moments in bf16 are within a unit in the last place, and right on average",
          "[cuda]") {
  if (skipped_without_gpu()) return;
  const int64_t n = 50000;
  OpCase c(76);
  const Slot grad = c.stat(c.normal({n}, 0.01)), param = c.stat(c.normal({n}));
  const Slot m = c.normal({n}, 0.01), v = c.uniform({n}, 1e-6, 1e-4);  // bf16 where F is
  const Slot step = c.scalars(scalars_of_step(5));
  const auto body = [&](Ops& ops, Stream& s, const Bound& t) {
    ops.adamw(s, kParams, t.scalars(step), t[grad], t[param], {}, t[m], t[v]);
  };
  // The same moments before, and every operation in f64.
  OpCase exact = c;
  const Bound rounded = c.bind_rounded();
  const Slot m64 = exact.values({n}, rounded.at(m).values());
  const Slot v64 = exact.values({n}, rounded.at(v).values());
  const Bound want = run_op(exact, DType::f64, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.adamw(s, kParams, t.scalars(step), t[grad], t[param], {}, t[m64], t[v64]);
  });
  const Bound got = run_op_on_gpu(c, DType::bf16, body);
  const Bound again = run_op_on_gpu(c, DType::bf16, body);
  CHECK(compare(got.at(param), want.at(param), {.roundings = 4}));
  CHECK(got.at(m).same_bits(again.at(m)));
  for (const auto& [slot, reference] : {std::pair(m, m64), std::pair(v, v64)}) {
    double errors = 0, size = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double x = want.at(reference).get(i), error = got.at(slot).get(i) - x;
      REQUIRE(std::fabs(error) <= 0x1p-7 * std::fabs(x) + 1e-8);
      errors += x < 0 ? -error : error;
      size += std::fabs(x);
    }
    // Cut off, they would be too small by a 500th part.
    CHECK(std::fabs(errors / size) < 4 * 0x1p-8 / std::sqrt(static_cast<double>(n)));
  }
}

}  // namespace
}  // namespace dstrain::test
