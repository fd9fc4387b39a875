// T tokens, E experts, K experts per token.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

RouterParams v3_params(int64_t groups, int64_t kept, int64_t K) {
  return {RouterScoring::sigmoid, GroupScore::best_two, groups, kept, K, true, 2.5};
}
RouterParams v2_params(int64_t groups, int64_t kept, int64_t K) {
  return {RouterScoring::softmax, GroupScore::best, groups, kept, K, false, 1.5};
}

// The first `count` positions of `values` in descending order, the lower index first among equals.
std::vector<int64_t> best_indices(const std::vector<double>& values, int64_t count) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
  });
  order.resize(static_cast<size_t>(count));
  return order;
}

// The choice for one token, by sorting everything. Sums are those of type F: ties depend on their rounding.
template <class F>
std::vector<int64_t> choose(std::vector<double> choice, const RouterParams& p) {
  const size_t size = choice.size() / static_cast<size_t>(p.groups);
  std::vector<double> group_scores;
  for (size_t g = 0; g < static_cast<size_t>(p.groups); ++g) {
    std::vector<double> part(choice.begin() + static_cast<int64_t>(g * size),
                             choice.begin() + static_cast<int64_t>((g + 1) * size));
    std::sort(part.rbegin(), part.rend());
    const bool two = p.group_score == GroupScore::best_two && size > 1;
    group_scores.push_back(two ? static_cast<F>(part[0]) + static_cast<F>(part[1]) : part[0]);
  }
  const std::vector<int64_t> kept = best_indices(group_scores, p.groups_per_token);
  for (size_t e = 0; e < choice.size(); ++e) {
    if (std::find(kept.begin(), kept.end(), static_cast<int64_t>(e / size)) == kept.end()) {
      choice[e] = -std::numeric_limits<double>::infinity();
    }
  }
  return best_indices(choice, p.experts_per_token);
}

struct RouterCase {
  OpCase c{31};
  int64_t T, E;
  RouterParams params;
  RowsOfSequences rows;
  Slot logits, bias, scores, indices, weights, dweights, coeff, dlogits, load, prob;

  RouterCase(int64_t tokens, int64_t experts, const RouterParams& p, int64_t sequences = 1)
      : T(tokens), E(experts), params(p) {
    const int64_t K = p.experts_per_token;
    rows.rows_per_sequence = T / std::max<int64_t>(1, sequences);
    logits = c.stat(c.normal({T, E}));
    bias = c.stat(c.normal({E}, 0.05));
    scores = c.stat(c.output({T, E}));
    indices = c.output(DType::i32, {T, K});
    weights = c.stat(c.output({T, K}));
    dweights = c.stat(c.normal({T, K}));
    coeff = c.stat(c.normal({sequences, E}));
    dlogits = c.stat(c.output({T, E}));
    load = c.stat(c.output({sequences, E}));
    prob = c.stat(c.output({sequences, E}));
  }
  void forward(Ops& ops, Stream& s, const Bound& b) const {
    ops.router_topk(s, b[logits], b[bias], params, b[scores], b[indices], b[weights]);
  }
  void backward(Ops& ops, Stream& s, const Bound& b, bool balance) const {
    ops.router_backward(s, b[dweights], b[scores], b[indices], params,
                        balance ? b[coeff] : Tensor(), rows, b[dlogits]);
  }
};

}  // namespace

TEST_CASE("router: f32 agrees with f64 and threads do not matter", "[op]") {
  const auto [T, E, groups, kept, K] =
      GENERATE(table<int64_t, int64_t, int64_t, int64_t, int64_t>({{0, 4, 1, 1, 2},
                                                                   {1, 1, 1, 1, 1},
                                                                   {3, 6, 3, 2, 3},
                                                                   {512, 16, 1, 1, 4},
                                                                   {9, 40, 1, 1, 6},
                                                                   {17, 160, 8, 3, 6},
                                                                   {5, 512, 64, 9, 32},
                                                                   {300, 256, 8, 4, 8}}));
  const bool v3 = GENERATE(true, false);
  CAPTURE(T, E, groups, kept, K, v3);
  const RouterCase r(T, E, v3 ? v3_params(groups, kept, K) : v2_params(groups, kept, K));
  const auto body = [&](Ops& ops, Stream& s, const Bound& b) {
    r.forward(ops, s, b);
    r.backward(ops, s, b, true);
  };
  check_op(r.c, body,
           {{r.scores, {.sum_length = E, .roundings = 4}},
            {r.weights, {.sum_length = E, .roundings = 6}}});
  // d(softmax) of a single expert is zero.
  if (E > 1) check_op(r.c, body, {{r.dlogits, {.sum_length = E, .roundings = 12}}});
  const Bound reference = run_op(r.c, DType::f64, 1, body);
  CHECK(run_op(r.c, DType::f32, 1, body).at(r.indices).same_bits(reference.at(r.indices)));
}

TEST_CASE("router_topk: the choice by sorting, with many ties", "[op]") {
  const auto [E, groups, kept, K] = GENERATE(table<int64_t, int64_t, int64_t, int64_t>(
      {{8, 1, 1, 3}, {12, 4, 2, 5}, {12, 4, 2, 6}, {16, 8, 3, 4}, {6, 6, 3, 2}, {99, 33, 5, 7}}));
  const bool v3 = GENERATE(true, false), biased = GENERATE(true, false);
  const DType dtype = GENERATE(DType::f64, DType::f32);
  CAPTURE(E, groups, kept, K, v3, biased, dtype_name(dtype));
  const int64_t T = 200;
  const RouterParams params = v3 ? v3_params(groups, kept, K) : v2_params(groups, kept, K);
  RouterCase r(T, E, params);
  std::vector<double> coarse;  // three different logits: equal experts and equal groups abound
  for (int64_t i = 0; i < T * E; ++i)
    coarse.push_back(static_cast<double>((i * i / 7 + i) % 3) - 1);
  r.logits = r.c.stat(r.c.values({T, E}, coarse));
  std::vector<double> bias;
  for (int64_t e = 0; e < E; ++e) bias.push_back(static_cast<double>(e % 3) * 0.25);
  r.bias = r.c.stat(r.c.values({E}, bias));
  const Bound b = run_op(r.c, dtype, 2, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.router_topk(s, t[r.logits], biased ? t[r.bias] : Tensor(), params, t[r.scores],
                    t[r.indices], t[r.weights]);
  });
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> choice;
    for (int64_t e = 0; e < E; ++e) {
      const double sum = b.at(r.scores).get(t * E + e) + (biased ? bias[static_cast<size_t>(e)] : 0);
      choice.push_back(dtype == DType::f32 ? static_cast<double>(static_cast<float>(sum)) : sum);
    }
    const std::vector<int64_t> chosen =
        dtype == DType::f32 ? choose<float>(choice, params) : choose<double>(choice, params);
    double total = 0;
    for (const int64_t e : chosen) total += b.at(r.scores).get(t * E + e);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t e = chosen[static_cast<size_t>(k)];
      REQUIRE(b.at(r.indices).get(t * K + k) == static_cast<double>(e));
      const double score = b.at(r.scores).get(t * E + e);
      REQUIRE(b.at(r.weights).get(t * K + k) == Approx(v3 ? score / total * 2.5 : score * 1.5));
    }
  }
}

TEST_CASE("router: scores", "[ops]") {
  RouterCase r(1, 3, v2_params(1, 1, 1));
  r.logits = r.c.stat(r.c.values({1, 3}, {1, 2, -1}));
  const double sum = std::exp(1.0) + std::exp(2.0) + std::exp(-1.0);
  Bound b =
      run_op(r.c, DType::f64, 1, [&](Ops& o, Stream& s, const Bound& t) { r.forward(o, s, t); });
  CHECK(b.at(r.scores).get(2) == Approx(std::exp(-1.0) / sum));
  r.params = v3_params(1, 1, 1);
  b = run_op(r.c, DType::f64, 1, [&](Ops& o, Stream& s, const Bound& t) { r.forward(o, s, t); });
  CHECK(b.at(r.scores).get(2) == Approx(1 / (1 + std::exp(1.0))));
}

TEST_CASE("router_topk: NaN and infinite logits give distinct indices in range", "[op]") {
  const bool v3 = GENERATE(true, false);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  RouterCase r(4, 8, v3 ? v3_params(4, 2, 3) : v2_params(4, 2, 3));
  std::vector<double> logits(32, 0.5);
  for (size_t i = 0; i < 8; ++i) {
    logits[i] = nan;
    logits[8 + i] = i % 2 == 0 ? nan : 1;
    logits[16 + i] = -inf;
    logits[24 + i] = i == 3 ? inf : -inf;
  }
  r.logits = r.c.stat(r.c.values({4, 8}, logits));
  const Bound b =
      run_op(r.c, DType::f32, 1, [&](Ops& o, Stream& s, const Bound& t) { r.forward(o, s, t); });
  for (int64_t t = 0; t < 4; ++t) {
    std::vector<double> row;
    for (int64_t k = 0; k < 3; ++k) row.push_back(b.at(r.indices).get(3 * t + k));
    std::sort(row.begin(), row.end());
    CHECK(std::unique(row.begin(), row.end()) == row.end());
    CHECK((row.front() >= 0 && row.back() < 8));
  }
}

TEST_CASE("router_weights: what router_topk gave", "[op]") {
  const bool v3 = GENERATE(true, false);
  const RouterCase r(50, 16, v3 ? v3_params(4, 2, 3) : v2_params(4, 2, 3));
  OpCase c = r.c;
  const Slot scores = c.stat(c.output({50, 16})), weights = c.stat(c.output({50, 3}));
  const Bound b = run_op(c, DType::f32, 2, [&](Ops& ops, Stream& s, const Bound& t) {
    r.forward(ops, s, t);
    ops.router_weights(s, t[r.logits], r.params, t[r.indices], t[scores], t[weights]);
  });
  CHECK(b.at(scores).same_bits(b.at(r.scores)));
  CHECK(b.at(weights).same_bits(b.at(r.weights)));
}

TEST_CASE("router: gradients of weights and balance, and faults turn the check red", "[ops]") {
  const auto scoring = GENERATE(RouterScoring::sigmoid, RouterScoring::softmax);
  const bool normalize = GENERATE(true, false);
  CAPTURE(static_cast<int>(scoring), normalize);
  RouterCase r(6, 5, {scoring, GroupScore::best, 1, 1, 2, normalize, 1.7}, /*sequences=*/2);
  r.indices = r.c.fixed(DType::i32, {6, 2}, {0, 1, 4, 2, 3, 0, 2, 1, 1, 4, 3, 2});
  const auto forward = [&](Ops& ops, Stream& s, const Bound& b) {
    ops.router_weights(s, b[r.logits], r.params, b[r.indices], b[r.scores], b[r.weights]);
    ops.balance_statistics(s, b[r.scores], b[r.indices], r.rows, b[r.load], b[r.prob]);
  };
  const auto check = [&](const OpBody& backward) {
    return check_gradient(r.c, forward, backward, {{r.weights, r.dweights}, {r.prob, r.coeff}},
                          {{r.logits, r.dlogits}});
  };
  CHECK(check([&](Ops& ops, Stream& s, const Bound& b) { r.backward(ops, s, b, true); }));
  CHECK_FALSE(check([&](Ops& ops, Stream& s, const Bound& b) { r.backward(ops, s, b, false); }));
  CHECK_FALSE(check([&](Ops& ops, Stream& s, const Bound& b) {
    RouterParams wrong = r.params;
    wrong.normalize = !normalize;
    ops.router_backward(s, b[r.dweights], b[r.scores], b[r.indices], wrong, b[r.coeff],
                        r.rows, b[r.dlogits]);
  }));
}

TEST_CASE("balance: statistics of each sequence", "[op]") {
  // 5 sequences of 260 tokens exceed one chunk of tokens.
  const int64_t S = 5, n = 260, E = 6, K = 2;
  const RouterCase r(S * n, E, v3_params(1, 1, K), S);
  const Bound b =
      check_op(r.c,
               [&](Ops& ops, Stream& s, const Bound& t) {
                 r.forward(ops, s, t);
                 ops.balance_statistics(s, t[r.scores], t[r.indices], r.rows, t[r.load], t[r.prob]);
               },
               {{r.load, {}}, {r.prob, {.sum_length = n, .roundings = 4}}});
  std::vector<double> load(S * E), prob(S * E);
  for (int64_t t = 0; t < S * n; ++t) {
    double sum = 0;
    for (int64_t e = 0; e < E; ++e) sum += b.at(r.scores).get(t * E + e);
    for (int64_t e = 0; e < E; ++e) {
      prob[static_cast<size_t>(t / n * E + e)] += b.at(r.scores).get(t * E + e) / sum;
    }
    for (int64_t k = 0; k < K; ++k) {
      load[static_cast<size_t>(t / n * E) + static_cast<size_t>(b.at(r.indices).get(t * K + k))] +=
          1;
    }
  }
  CHECK(b.at(r.load).values() == load);
  CHECK(compare_within(b.at(r.prob), HostTensor(DType::f64, {S * E}, prob), 1e-13));
}

TEST_CASE("balance: rows that begin and end inside of sequences", "[op]") {
  const int64_t S = 3, n = 100, E = 70, T = 90;
  RouterCase r(T, E, v2_params(1, 1, 32), S);
  r.rows = {/*first_row=*/130, n};
  const Bound b =
      check_op(r.c,
               [&](Ops& ops, Stream& s, const Bound& t) {
                 r.forward(ops, s, t);
                 ops.balance_statistics(s, t[r.scores], t[r.indices], r.rows, t[r.load], t[r.prob]);
                 r.backward(ops, s, t, true);
               },
               {{r.load, {}},
                {r.prob, {.sum_length = n, .roundings = 4}},
                {r.dlogits, {.sum_length = E, .roundings = 12}}});
  std::vector<double> tokens(S);
  for (int64_t i = 0; i < S * E; ++i) tokens[static_cast<size_t>(i / E)] += b.at(r.prob).get(i);
  CHECK(tokens[0] == 0);
  CHECK(tokens[1] == Approx(70));
  CHECK(tokens[2] == Approx(20));
}

TEST_CASE("balance_loss: formula, gradient, accumulation", "[op]") {
  const int64_t S = 2, E = 3, n = 4, K = 2;
  const double alpha = 0.01;
  OpCase c(33);
  const Slot load = c.stat(c.values({S, E}, {3, 2, 3, 8, 0, 0}));
  const Slot prob = c.stat(c.values({S, E}, {1.5, 1, 1.5, 2.25, 1.25, 0.5}));
  const Slot loss = c.fixed(DType::f64, {1}, {7}), coeff = c.stat(c.output({S, E}));
  const Slot one = c.values({1}, {1});
  const auto body = [&](Ops& ops, Stream& s, const Bound& b) {
    ops.balance_loss(s, b[load], b[prob], n, K, alpha, b[loss], b[coeff]);
  };
  const Bound b = check_op(c, body, {{coeff, {.roundings = 2}}});
  double expected = 0;
  for (int64_t i = 0; i < S * E; ++i) {
    const double f = b.at(load).get(i) * E / (K * n), p = b.at(prob).get(i) / n;
    expected += alpha * f * p;
  }
  CHECK(b.at(loss).get(0) == Approx(7 + expected).epsilon(1e-14));
  const double in_f32 = run_op(c, DType::f32, 1, body).at(loss).get(0) - 7;
  CHECK(in_f32 == Approx(expected).epsilon(1e-6));
  const auto check = [&](const OpBody& backward) {
    return check_gradient(c, body, backward, {{loss, one}}, {{prob, coeff}}, 1e-6);
  };
  CHECK(check([](Ops&, Stream&, const Bound&) {}));
  CHECK_FALSE(check([&](Ops&, Stream&, const Bound& t) { t[coeff].data<double>()[4] += 1e-5; }));
}

TEST_CASE("count_experts adds", "[op]") {
  const int64_t T = 5000, E = 7;
  OpCase c(34);
  const Slot indices = c.integers({T, 2}, 0, E);
  const Slot counts = c.fixed(DType::i64, {E}, {1, 0, 0, 0, 0, 0, 100});
  const auto body = [&](Ops& ops, Stream& s, const Bound& b) {
    ops.count_experts(s, b[indices], b[counts]);
  };
  const Bound b = check_op(c, body, {});
  std::vector<double> expected{1, 0, 0, 0, 0, 0, 100};
  for (const double e : b.at(indices).values()) expected[static_cast<size_t>(e)] += 1;
  CHECK(b.at(counts).values() == expected);
}

TEST_CASE("count_experts refuses an index out of range", "[ops]") {
  OpCase bad(35);
  const Slot wrong = bad.fixed(DType::i32, {1, 2}, {1, 7});
  const Slot seven = bad.fixed(DType::i64, {7}, std::vector<double>(7));
  CHECK_THROWS_WITH(run_op(bad, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& t) {
                             ops.count_experts(s, t[wrong], t[seven]);
                           }),
                    Catch::Contains("expert index 7 is not in [0, 7)"));
}

TEST_CASE("router_bias_update: towards the mean by the sign, not in a skipped step", "[op]") {
  OpCase c(36);
  const Slot counts = c.fixed(DType::i64, {4}, {10, 2, 6, 6});
  const Slot bias = c.stat(c.values({4}, {0.5, 0.5, 0.5, 0.5}));
  const Slot applied = c.scalars({}), skipped = c.scalars(skipped_step());
  const auto update = [=](Slot scalars) {
    return [=](Ops& ops, Stream& s, const Bound& b) {
      ops.router_bias_update(s, b[counts], 0.125, b.scalars(scalars), b[bias]);
    };
  };
  const std::vector<double> moved{0.375, 0.625, 0.5, 0.5}, still(4, 0.5);
  CHECK(check_op(c, update(applied), {{bias, {}}}).at(bias).values() == moved);
  CHECK(check_op(c, update(skipped), {{bias, {}}}).at(bias).values() == still);
}

TEST_CASE("router_weights: a recorded index out of range is refused", "[ops]") {
  const int64_t index = GENERATE(-1, 8);
  RouterCase r(1, 8, v3_params(1, 1, 1));
  r.indices = r.c.fixed(DType::i32, {1, 1}, {static_cast<double>(index)});
  CHECK_THROWS_WITH(run_op(r.c, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& b) {
                             ops.router_weights(s, b[r.logits], r.params, b[r.indices], b[r.scores],
                                                b[r.weights]);
                           }),
                    Catch::Contains("is not in [0, 8)"));
}

TEST_CASE("router: settings that cannot choose K experts are refused", "[ops]") {
  const RouterCase r(2, 8, v3_params(4, 1, 3));
  CHECK_THROWS_WITH(
      run_op(r.c, DType::f32, 1, [&](Ops& o, Stream& s, const Bound& b) { r.forward(o, s, b); }),
      Catch::Contains("3 of 8 experts cannot be chosen from 1 of 4 groups"));
}

}  // namespace dstrain::test
