#include <cmath>
#include <limits>

#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

struct AdamCase {
  OpCase c{71};
  Slot grad, param, exp_avg, exp_avg_sq, scalars;
  AdamWParams params{0.9, 0.95, 1e-8, 0.1};
  StepScalars at_step_5;

  // Parameters are f32 masters, whatever activations are.
  explicit AdamCase(int64_t n) {
    grad = c.stat(c.normal({n}, 0.01));
    param = c.stat(c.normal({n}));
    exp_avg = c.stat(c.normal({n}, 0.01));
    exp_avg_sq = c.stat(c.uniform({n}, 1e-6, 1e-4));
    at_step_5.in.lr = 3e-3;
    at_step_5.bias_correction1 = 1 - std::pow(0.9, 5);
    at_step_5.bias_correction2 = 1 - std::pow(0.95, 5);
    at_step_5.grad_scale = 0.7;
    scalars = c.scalars(at_step_5);
  }
  void step(Ops& ops, Stream& s, const Bound& b) const {
    ops.adamw(s, params, b.scalars(scalars), b[grad], b[param], {}, b[exp_avg], b[exp_avg_sq]);
  }
};

}  // namespace

TEST_CASE("adamw: f32 agrees with f64, and the formula holds", "[op]") {
  const int64_t n = GENERATE(0, 1, 37, 100001);
  const AdamCase a(n);
  const auto body = [&](Ops& ops, Stream& s, const Bound& b) { a.step(ops, s, b); };
  const Bound before = a.c.bind(DType::f64);
  const Bound b = check_op(a.c, body,
                           {{a.param, {.roundings = 4}},
                            {a.exp_avg, {.roundings = 4}},
                            {a.exp_avg_sq, {.roundings = 4}}});
  for (int64_t i = 0; i < std::min<int64_t>(n, 50); ++i) {
    const double g = before.at(a.grad).get(i) * a.at_step_5.grad_scale;
    const double m = 0.9 * before.at(a.exp_avg).get(i) + 0.1 * g;
    const double v = 0.95 * before.at(a.exp_avg_sq).get(i) + 0.05 * g * g;
    const double p = before.at(a.param).get(i);
    const double m_hat = m / a.at_step_5.bias_correction1, v_hat = v / a.at_step_5.bias_correction2;
    const double expected = p - a.at_step_5.in.lr * (0.1 * p + m_hat / (std::sqrt(v_hat) + 1e-8));
    CHECK(b.at(a.param).get(i) == Approx(expected).epsilon(1e-13));
    CHECK(b.at(a.exp_avg).get(i) == Approx(m).epsilon(1e-13));
    CHECK(b.at(a.exp_avg_sq).get(i) == Approx(v).epsilon(1e-13));
  }
}

TEST_CASE("adamw: the change of a parameter is accurate, not only the parameter", "[op]") {
  // With parameters of zero the result is the update alone.
  AdamCase a(1000);
  a.param = a.c.stat(a.c.values({1000}, std::vector<double>(1000)));
  check_op(a.c, [&](Ops& ops, Stream& s, const Bound& b) { a.step(ops, s, b); },
           {{a.param, {.roundings = 12}}});
}

TEST_CASE("adamw: a step that is not finite changes nothing", "[op]") {
  AdamCase a(100);
  a.at_step_5.finite = 0;
  a.scalars = a.c.scalars(a.at_step_5);
  const Bound before = a.c.bind(DType::f32);
  const Bound b =
      run_op(a.c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) { a.step(ops, s, t); });
  for (const Slot slot : {a.param, a.exp_avg, a.exp_avg_sq}) {
    CHECK(b.at(slot).same_bits(before.at(slot)));
  }
}

TEST_CASE("adamw: gradients of zero keep moments of zero and only decay", "[ops]") {
  AdamCase a(3);
  const std::vector<double> zeros(3);
  a.grad = a.c.values({3}, zeros);
  a.exp_avg = a.c.values({3}, zeros);
  a.exp_avg_sq = a.c.values({3}, zeros);
  a.param = a.c.values({3}, {1, -2, 0});
  a.params.eps = 0.25;
  const Bound b =
      run_op(a.c, DType::f64, 1, [&](Ops& ops, Stream& s, const Bound& t) { a.step(ops, s, t); });
  const double keep = 1 - a.at_step_5.in.lr * a.params.weight_decay;
  CHECK(b.at(a.param).values() == std::vector<double>{keep, -2 * keep, 0});
}

TEST_CASE("add_sum_squares adds in an order that threads do not change", "[op]") {
  const int64_t n = GENERATE(0, 1, 65, 131072, 200003);
  OpCase c(72);
  const Slot x = c.stat(c.normal({n}, 1e-3)), sum = c.fixed(DType::f64, {1}, {2.5});
  const Bound b = check_op(
      c, [&](Ops& ops, Stream& s, const Bound& t) { ops.add_sum_squares(s, t[x], t[sum]); },
      {{sum, {.sum_length = n + 1}}});
  double expected = 2.5;
  for (const double value : b.at(x).values()) expected += value * value;
  CHECK(b.at(sum).get(0) == Approx(expected).epsilon(1e-13));
}

TEST_CASE("optimizer: where a range begins does not matter", "[op]") {
  const int64_t n = GENERATE(6, 70001), begin = GENERATE(1, 3);
  const AdamCase a(n);
  OpCase c = a.c;
  const Slot sum = c.fixed(DType::f64, {1}, {0}), sum2 = c.fixed(DType::f64, {1}, {0});
  std::vector<Slot> copies;
  for (int i = 0; i < 4; ++i) copies.push_back(c.stat(c.output({n + 8})));
  const Bound b = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    const auto copy = [&](size_t i) { return t[copies[i]].rows(begin, begin + n); };
    ops.convert(s, t[a.grad], copy(0));
    ops.convert(s, t[a.param], copy(1));
    ops.convert(s, t[a.exp_avg], copy(2));
    ops.convert(s, t[a.exp_avg_sq], copy(3));
    ops.add_sum_squares(s, t[a.grad], t[sum]);
    ops.add_sum_squares(s, copy(0), t[sum2]);
    a.step(ops, s, t);
    ops.adamw(s, a.params, t.scalars(a.scalars), copy(0), copy(1), {}, copy(2), copy(3));
  });
  CHECK(b.at(sum).get(0) > 0);
  CHECK(b.at(sum2).same_bits(b.at(sum)));
  const Slot whole[] = {a.grad, a.param, a.exp_avg, a.exp_avg_sq};
  for (size_t i = 0; i < 4; ++i) {
    bool same = true;
    for (int64_t at = 0; at < n; ++at)
      same = same && b.at(copies[i]).get(begin + at) == b.at(whole[i]).get(at);
    CHECK(same);
    CHECK(std::isnan(b.at(copies[i]).get(begin - 1)));
    CHECK(std::isnan(b.at(copies[i]).get(begin + n)));
  }
}

TEST_CASE("add_sum_squares does not overflow where f32 would", "[op]") {
  OpCase c(73);
  const Slot x = c.stat(c.values({2}, {3e30, 4e30})), sum = c.fixed(DType::f64, {1}, {0});
  const Bound b = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.add_sum_squares(s, t[x], t[sum]);
  });
  CHECK(std::sqrt(b.at(sum).get(0)) == Approx(5e30));
}

TEST_CASE("clip_scale", "[op]") {
  const auto clip = [](double sum_squares, double max_norm) {
    OpCase c(74);
    const Slot sum = c.fixed(DType::f64, {1}, {sum_squares}), scalars = c.scalars({});
    const Bound after = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& b) {
      ops.clip_scale(s, b[sum], max_norm, 0.9, 0.5, b.scalars(scalars));
    });
    return after.scalars_at(scalars);
  };
  CHECK(clip(25, 1).grad_norm == 5);
  CHECK(clip(25, 1).grad_scale == Approx(1 / (5 + 1e-6)).epsilon(1e-15));
  CHECK(clip(25, 10).grad_scale == 1);
  CHECK(clip(25, 0).grad_scale == 1);
  CHECK(clip(0, 1).grad_scale == 1);
  CHECK(clip(25, 1).finite == 1);
  CHECK(clip(std::numeric_limits<double>::infinity(), 1).finite == 0);
  CHECK(clip(std::nan(""), 1).finite == 0);
  // A finite gradient is an update, with its number and corrections; any other is none.
  CHECK(clip(25, 1).updates == 1);
  CHECK(clip(25, 1).bias_correction1 == Approx(0.1).epsilon(1e-14));
  CHECK(clip(25, 1).bias_correction2 == 0.5);
  CHECK(clip(std::nan(""), 1).updates == 0);
}

TEST_CASE("adamw: ranges of different length are refused", "[ops]") {
  AdamCase a(4);
  a.grad = a.c.normal({3});
  CHECK_THROWS_WITH(
      run_op(a.c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& b) { a.step(ops, s, b); }),
      Catch::Contains("adamw: grad is f32[3] where 4 contiguous f32 belong"));
}

}  // namespace dstrain::test
