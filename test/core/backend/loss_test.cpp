// T tokens, V logits of a token, K alternatives of a soft target.
#include <cmath>
#include <limits>

#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct LossCase {
  OpCase c{51};
  int64_t T, V;
  bool soft;
  double factor = 0.5;
  double loss_scale = 0.125;
  Slot scalars, logits, hard, soft_index, soft_prob, max, sum_exp, target, lse, loss, token_loss;

  // Hard targets in [-1, V): about one in V is ignored. Weights of soft targets do not sum to 1.
  LossCase(int64_t tokens, int64_t vocab, bool soft_targets, double spread = 2)
      : T(tokens), V(vocab), soft(soft_targets) {
    logits = c.normal({T, V}, spread);
    hard = c.integers({T}, T == 1 ? 0 : -1, V);
    soft_index = c.integers({T, 3}, 0, V);
    soft_prob = c.stat(c.uniform({T, 3}, 0.1, 0.4));
    max = c.stat(c.output({T}));
    sum_exp = c.stat(c.output({T}));
    target = c.stat(c.output({T}));
    lse = c.stat(c.output({T}));
    loss = c.fixed(DType::f64, {1}, {0});
    token_loss = c.stat(c.output({T}));
    StepScalars step;
    step.in.loss_scale = loss_scale;
    scalars = c.scalars(step);
  }
  CrossEntropyTargets targets(const Bound& b) const {
    if (soft) return {Tensor(), b[soft_index], b[soft_prob]};
    return {b[hard], Tensor(), Tensor()};
  }
  void forward(Ops& ops, Stream& s, const Bound& b) const {
    ops.cross_entropy_stats(s, b[logits], targets(b), 0, b[max], b[sum_exp], b[target]);
    ops.cross_entropy_loss(s, targets(b), b[max], b[sum_exp], b[target], b[lse], b[loss],
                           b[token_loss]);
  }
  void backward(Ops& ops, Stream& s, const Bound& b) const {
    ops.cross_entropy_backward(s, b[logits], targets(b), 0, b[lse], b.scalars(scalars), factor);
  }
};

// Loss of token t by the definition.
double token_loss(const LossCase& l, const Bound& b, int64_t t) {
  double sum = 0, max = -kInf;
  const auto logit = [&](double v) {
    return b.at(l.logits).get(t * l.V + static_cast<int64_t>(v));
  };
  for (int64_t v = 0; v < l.V; ++v) max = std::max(max, b.at(l.logits).get(t * l.V + v));
  for (int64_t v = 0; v < l.V; ++v) sum += std::exp(b.at(l.logits).get(t * l.V + v) - max);
  const double lse = max + std::log(sum);
  if (!l.soft) {
    const double target = b.at(l.hard).get(t);
    return target < 0 ? 0 : lse - logit(target);
  }
  double loss = 0;
  for (int64_t k = 3 * t; k < 3 * t + 3; ++k) {
    loss += b.at(l.soft_prob).get(k) * (lse - logit(b.at(l.soft_index).get(k)));
  }
  return loss;
}

}  // namespace

TEST_CASE("cross entropy: f32 agrees with f64 and threads do not matter", "[op][large]") {
  const auto [T, V] = GENERATE(table<int64_t, int64_t>(
      {{0, 5}, {1, 2}, {7, 100}, {1500, 33}, {64, 4096}, {3, 6001}, {5, 40005}}));
  const bool soft = GENERATE(false, true);
  CAPTURE(T, V, soft);
  // A single token's loss must not cancel to nearly nothing.
  const LossCase l(T, V, soft, /*spread=*/T == 1 ? 0.3 : 2);
  const auto forward = [&](Ops& ops, Stream& s, const Bound& b) { l.forward(ops, s, b); };
  const Bound b = check_op(l.c, forward,
                           {{l.max, {}},
                            {l.sum_exp, {.sum_length = V, .roundings = 2}},
                            {l.target, {.sum_length = 3, .expect_exact_zero = T == 0}},
                            {l.lse, {.sum_length = V}},
                            {l.token_loss, {.sum_length = V, .roundings = 2}}});
  double sum = 0;
  for (int64_t t = 0; t < T; ++t) {
    const double expected = token_loss(l, b, t);
    REQUIRE(b.at(l.token_loss).get(t) == Approx(expected).margin(1e-12));
    sum += expected;
  }
  CHECK(b.at(l.loss).get(0) == Approx(sum).margin(1e-12));
  CHECK(run_op(l.c, DType::f32, 2, forward).at(l.loss).get(0) == Approx(sum).epsilon(1e-6));
  // An error of the log-sum-exp, u |lse|, is a relative error of every probability.
  check_op(l.c,
           [&](Ops& ops, Stream& s, const Bound& t) {
             l.forward(ops, s, t);
             l.backward(ops, s, t);
           },
           {{l.logits, {.sum_length = V, .roundings = 16}}});
}

TEST_CASE("cross entropy: gradients, and a fault turns the check red", "[ops]") {
  const bool soft = GENERATE(false, true);
  const int64_t T = 6, V = 9;
  LossCase l(T, V, soft);
  l.hard = l.c.fixed(DType::i32, {T}, {3, 0, -1, 8, 5, 5});
  // dlogits replace the logits, so that they are copied out of them; the weight of each token's
  // loss is loss_scale * factor.
  const Slot dlogits = l.c.output({T, V});
  const Slot weight = l.c.values({T}, std::vector<double>(T, l.loss_scale * l.factor));
  const auto forward = [&](Ops& ops, Stream& s, const Bound& b) { l.forward(ops, s, b); };
  const auto check = [&](const OpBody& backward) {
    return check_gradient(l.c, forward, backward, {{l.token_loss, weight}}, {{l.logits, dlogits}});
  };
  const auto backward = [&](Ops& ops, Stream& s, const Bound& b) {
    l.backward(ops, s, b);
    ops.convert(s, b[l.logits], b[dlogits]);
  };
  CHECK(check(backward));
  CHECK_FALSE(check([&](Ops& ops, Stream& s, const Bound& b) {
    b[l.lse].data<double>()[4] += 1e-5;
    backward(ops, s, b);
  }));
}

TEST_CASE("cross entropy: slices of the vocabulary join to the whole", "[op]") {
  const bool soft = GENERATE(false, true);
  const int64_t T = 20, V = 50, cut = 21;
  LossCase l(T, V, soft);
  const auto stat = [&] { return l.c.stat(l.c.output({T})); };
  const Slot max1 = stat(), sum1 = stat(), target1 = stat(), max2 = stat(), sum2 = stat();
  const Slot target2 = stat(), lse2 = stat(), loss2 = l.c.fixed(DType::f64, {1}, {0});
  const Slot left = l.c.output({T, cut}), right = l.c.output({T, V - cut});
  const Slot joined = l.c.output({T, V});
  const auto body = [&](Ops& ops, Stream& s, const Bound& t) {
    ops.convert(s, t[l.logits].columns(0, cut), t[left]);
    ops.convert(s, t[l.logits].columns(cut, V), t[right]);
    l.forward(ops, s, t);
    l.backward(ops, s, t);

    // The joint maximum is that of the whole.
    ops.cross_entropy_stats(s, t[left], l.targets(t), 0, t[max1], t[sum1], t[target1]);
    ops.cross_entropy_stats(s, t[right], l.targets(t), cut, t[max2], t[sum2], t[target2]);
    ops.rescale_sum_exp(s, t[max1], t[l.max], t[sum1]);
    ops.rescale_sum_exp(s, t[max2], t[l.max], t[sum2]);
    ops.add(s, t[sum1], t[sum2], t[sum2]);
    ops.add(s, t[target1], t[target2], t[target2]);
    ops.cross_entropy_loss(s, l.targets(t), t[l.max], t[sum2], t[target2], t[lse2], t[loss2],
                           Tensor());
    const StepScalars* const scalars = t.scalars(l.scalars);
    ops.cross_entropy_backward(s, t[left], l.targets(t), 0, t[lse2], scalars, l.factor);
    ops.cross_entropy_backward(s, t[right], l.targets(t), cut, t[lse2], scalars, l.factor);
    ops.convert(s, t[left], t[joined].columns(0, cut));
    ops.convert(s, t[right], t[joined].columns(cut, V));
  };
  const Tolerance gradient{.sum_length = V, .roundings = 16};
  const Bound b = check_op(l.c, body,
                           {{sum1, {.sum_length = V, .roundings = 4}},
                            {target2, {.sum_length = 3}},
                            {lse2, {.sum_length = V}},
                            {left, gradient},
                            {right, gradient}});
  CHECK(compare_within(b.at(lse2), b.at(l.lse), 1e-14));
  CHECK(compare_within(b.at(loss2), b.at(l.loss), 1e-14));
  CHECK(compare_within(b.at(joined), b.at(l.logits), 1e-13));
}

TEST_CASE("cross entropy: large logits and masked logits", "[op]") {
  OpCase c(53);
  const Slot logits = c.values({3, 4}, {1e4, 1e4, -1e4, -kInf, -kInf, 3, -kInf, -kInf, 0, 0, 0, 0});
  const Slot hard = c.fixed(DType::i32, {3}, {0, 1, 2});
  const auto stat = [&] { return c.stat(c.output({3})); };
  const Slot max = stat(), sum = stat(), target = stat(), lse = stat(), token_loss = stat();
  const Slot loss = c.fixed(DType::f64, {1}, {0}), scalars = c.scalars({});
  const Bound b = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    const CrossEntropyTargets targets{t[hard], Tensor(), Tensor()};
    ops.cross_entropy_stats(s, t[logits], targets, 0, t[max], t[sum], t[target]);
    ops.cross_entropy_loss(s, targets, t[max], t[sum], t[target], t[lse], t[loss], t[token_loss]);
    ops.cross_entropy_backward(s, t[logits], targets, 0, t[lse], t.scalars(scalars), 1);
  });
  CHECK(b.at(token_loss).get(0) == Approx(std::log(2.0)).epsilon(1e-3));  // 1e4 has 7 digits
  CHECK(b.at(token_loss).get(1) == 0);
  CHECK(b.at(token_loss).get(2) == Approx(std::log(4.0)));
  CHECK(b.at(logits).get(3) == 0);
  CHECK(b.at(logits).get(5) == 0);
  CHECK(b.at(logits).get(10) == Approx(-0.75));
}

TEST_CASE("cross entropy: a slice without finite logits adds nothing", "[op]") {
  OpCase c(54);
  const Slot logits = c.values({1, 2}, {-kInf, -kInf}), hard = c.fixed(DType::i32, {1}, {5});
  const auto stat = [&] { return c.stat(c.output({1})); };
  const Slot max = stat(), sum = stat(), target = stat(), joint = c.stat(c.values({1}, {2}));
  const Bound b = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.cross_entropy_stats(s, t[logits], {t[hard], Tensor(), Tensor()}, 0, t[max], t[sum],
                            t[target]);
    ops.rescale_sum_exp(s, t[max], t[joint], t[sum]);
    ops.rescale_sum_exp(s, t[max], t[max], t[sum]);
  });
  CHECK(b.at(max).get(0) == -kInf);
  CHECK(b.at(sum).get(0) == 0);
  CHECK(b.at(target).get(0) == 0);
}

TEST_CASE("cross entropy: an ignored token has no loss and no gradient even if it is NaN", "[op]") {
  OpCase c(55);
  const Slot logits = c.values({1, 2}, {std::nan(""), 1}), hard = c.fixed(DType::i32, {1}, {-1});
  const auto stat = [&] { return c.stat(c.output({1})); };
  const Slot max = stat(), sum = stat(), target = stat(), lse = stat();
  const Slot loss = c.fixed(DType::f64, {1}, {3}), scalars = c.scalars({});
  const Bound b = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    const CrossEntropyTargets targets{t[hard], Tensor(), Tensor()};
    ops.cross_entropy_stats(s, t[logits], targets, 0, t[max], t[sum], t[target]);
    ops.cross_entropy_loss(s, targets, t[max], t[sum], t[target], t[lse], t[loss], Tensor());
    ops.cross_entropy_backward(s, t[logits], targets, 0, t[lse], t.scalars(scalars), 1);
  });
  CHECK(b.at(loss).get(0) == 3);
  CHECK(b.at(logits).values() == std::vector<double>{0, 0});
}

TEST_CASE("cross entropy: both kinds of target at once are refused", "[ops]") {
  const LossCase l(2, 3, false);
  CHECK_THROWS_WITH(run_op(l.c, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& b) {
                             ops.cross_entropy_stats(s, b[l.logits],
                                                     {b[l.hard], b[l.soft_index], b[l.soft_prob]},
                                                     0, b[l.max], b[l.sum_exp], b[l.target]);
                           }),
                    Catch::Contains("either hard or soft targets"));
}

}  // namespace dstrain::test
