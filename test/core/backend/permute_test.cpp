// T tokens, K experts per token, E experts, R = T*K rows, D columns.
#include <algorithm>

#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

struct SortCase {
  OpCase c{41};
  int64_t T, K, E;
  Slot indices, weights, offsets, token_of_row, row_of_slot, row_weight;

  SortCase(int64_t tokens, int64_t k, int64_t experts) : T(tokens), K(k), E(experts) {
    indices = c.integers({T, K}, 0, E);
    add_outputs();
  }
  void add_outputs() {
    weights = c.stat(c.normal({T, K}));
    offsets = c.output(DType::i32, {E + 1});
    token_of_row = c.output(DType::i32, {T * K});
    row_of_slot = c.output(DType::i32, {T, K});
    row_weight = c.stat(c.output({T * K}));
  }
  void sort(Ops& ops, Stream& s, const Bound& b) const {
    ops.sort_by_expert(s, b[indices], b[weights], b[offsets], b[token_of_row], b[row_of_slot],
                       b[row_weight]);
  }
};

}  // namespace

TEST_CASE("sort_by_expert is a stable sort", "[op]") {
  const auto [T, K, E] = GENERATE(table<int64_t, int64_t, int64_t>(
      {{0, 2, 3}, {1, 1, 1}, {5, 3, 40}, {700, 3, 600}, {9001, 4, 16}, {22000, 6, 65}}));
  CAPTURE(T, K, E);
  const SortCase z(T, K, E);
  const Bound b = check_op(z.c, [&](Ops& ops, Stream& s, const Bound& t) { z.sort(ops, s, t); },
                           {{z.row_weight, {.expect_exact_zero = T == 0}}});
  std::vector<int64_t> order(static_cast<size_t>(T * K));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    return b.at(z.indices).get(x) < b.at(z.indices).get(y);
  });
  bool same = true;
  std::vector<double> offsets(static_cast<size_t>(E + 1));
  for (int64_t r = 0; r < T * K; ++r) {
    const int64_t slot = order[static_cast<size_t>(r)];
    same = same && b.at(z.token_of_row).get(r) == static_cast<double>(slot / K) &&
           b.at(z.row_of_slot).get(slot) == static_cast<double>(r) &&
           b.at(z.row_weight).get(r) == b.at(z.weights).get(slot);
    for (auto e = static_cast<int64_t>(b.at(z.indices).get(slot)) + 1; e <= E; ++e) {
      offsets[static_cast<size_t>(e)] += 1;
    }
  }
  CHECK(same);
  CHECK(b.at(z.offsets).values() == offsets);
}

TEST_CASE("combine_rows: f32 agrees with f64 and the formula holds", "[op]") {
  const auto [T, K, D] = GENERATE(table<int64_t, int64_t, int64_t>(
      {{0, 2, 8}, {1, 1, 1}, {7, 3, 5}, {33, 4, 64}, {200, 8, 130}, {11, 6, 1}, {5, 11, 2056}}));
  const bool with_addend = GENERATE(true, false);
  CAPTURE(T, K, D, with_addend);
  SortCase z(T, K, 5);
  const Slot y = z.c.normal({T * K, D}), addend = z.c.normal({T, D}), out = z.c.output({T, D});
  const Bound b = check_op(z.c,
                           [&](Ops& ops, Stream& s, const Bound& t) {
                             z.sort(ops, s, t);
                             ops.combine_rows(s, t[y], t[z.row_of_slot],
                                              with_addend ? t[addend] : Tensor(), t[out]);
                           },
                           {{out, {.sum_length = K + 1, .roundings = 2}}});
  HostTensor expected(DType::f64, {T, D});
  for (int64_t i = 0; i < T * D; ++i) {
    double sum = with_addend ? b.at(addend).get(i) : 0;
    for (int64_t k = 0; k < K; ++k) {
      const auto r = static_cast<int64_t>(b.at(z.row_of_slot).get(i / D * K + k));
      sum += b.at(y).get(r * D + i % D);
    }
    expected.set(i, sum);
  }
  CHECK(compare_within(b.at(out), expected, 1e-14));
}

TEST_CASE("combine_rows: addend in place, and the gradient of gathered rows", "[ops]") {
  // The rows that experts read are copies of token rows; combine_rows sums their gradients.
  SortCase z(6, 3, 4);
  const Slot x = z.c.normal({6, 5}), rows = z.c.output({18, 5});
  const Slot drows = z.c.normal({18, 5}), dx = z.c.values({6, 5}, std::vector<double>(30));
  const auto forward = [&](Ops& ops, Stream& s, const Bound& b) {
    z.sort(ops, s, b);
    ops.gather_rows(s, b[x], b[z.token_of_row], b[rows]);
  };
  const auto check = [&](const OpBody& backward) {
    return check_gradient(z.c, forward, backward, {{rows, drows}}, {{x, dx}});
  };
  const auto backward = [&](Ops& ops, Stream& s, const Bound& b) {
    ops.combine_rows(s, b[drows], b[z.row_of_slot], b[dx], b[dx]);
  };
  CHECK(check(backward));
  CHECK_FALSE(check([&](Ops& ops, Stream& s, const Bound& b) {
    std::swap(b[z.row_of_slot].data<int32_t>()[0], b[z.row_of_slot].data<int32_t>()[17]);
    backward(ops, s, b);
  }));
}

TEST_CASE("gather_rows: any type, one column, strided rows", "[op]") {
  OpCase c(43);
  const Slot x = c.normal({10, 6}), index = c.integers({7}, 0, 10), y = c.output({7, 6});
  const Slot part = c.output({7, 2}), column = c.output({7, 1});
  const Slot numbers = c.integers({10, 1}, 0, 1000), picked = c.output(DType::i32, {7, 1});
  const Bound b = check_op(c,
                           [&](Ops& ops, Stream& s, const Bound& t) {
                             ops.gather_rows(s, t[x], t[index], t[y]);
                             ops.gather_rows(s, t[x].columns(3, 5), t[index], t[part]);
                             ops.gather_rows(s, t[x].columns(3, 4), t[index], t[column]);
                             ops.gather_rows(s, t[numbers], t[index], t[picked]);
                           },
                           {{y, {}}, {part, {}}, {column, {}}});
  for (int64_t r = 0; r < 7; ++r) {
    const auto i = static_cast<int64_t>(b.at(index).get(r));
    for (int64_t d = 0; d < 6; ++d) CHECK(b.at(y).get(r * 6 + d) == b.at(x).get(i * 6 + d));
    CHECK(b.at(part).get(2 * r + 1) == b.at(x).get(i * 6 + 4));
    CHECK(b.at(column).get(r) == b.at(x).get(i * 6 + 3));
    CHECK(b.at(picked).get(r) == b.at(numbers).get(i));
  }
}

TEST_CASE("combine_rows and gather_rows: columns of wider matrices, long and short rows", "[op]") {
  const auto [T, D, begin] =
      GENERATE(table<int64_t, int64_t, int64_t>({{9, 2048, 8}, {9, 2047, 1}, {3000, 1, 2}}));
  CAPTURE(T, D, begin);
  const int64_t K = 2, end = begin + D;
  SortCase z(T, K, 3);
  const Slot y = z.c.normal({T * K, D + 16}), out = z.c.normal({T, D + 16});
  const Slot sum = z.c.output({T, D}), rows = z.c.output({T * K, D});
  const Bound b =
      check_op(z.c,
               [&, first = begin](Ops& ops, Stream& s, const Bound& t) {
                 z.sort(ops, s, t);
                 const Tensor part = t[out].columns(first, end);
                 ops.combine_rows(s, t[y].columns(first, end), t[z.row_of_slot], part, part);
                 ops.convert(s, part, t[sum]);
                 ops.gather_rows(s, part, t[z.token_of_row], t[rows]);
               },
               {{out, {.sum_length = K + 1, .roundings = 2}},
                {sum, {.sum_length = K + 1, .roundings = 2}},
                {rows, {.sum_length = K + 1, .roundings = 2}}});
  bool same = true;
  for (int64_t r = 0; r < T * K; ++r) {
    const auto t = static_cast<int64_t>(b.at(z.token_of_row).get(r));
    for (int64_t d = 0; d < D; ++d) {
      same = same && b.at(rows).get(r * D + d) == b.at(out).get(t * (D + 16) + begin + d);
    }
  }
  CHECK(same);
}

TEST_CASE("permutations refuse rows out of range", "[ops]") {
  OpCase c(44);
  const Slot x = c.normal({3, 2}), index = c.fixed(DType::i32, {1}, {3}), y = c.output({1, 2});
  const Slot slots = c.fixed(DType::i32, {1, 2}, {0, 4});
  CHECK_THROWS_WITH(run_op(c, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& b) {
                             ops.gather_rows(s, b[x], b[index], b[y]);
                           }),
                    Catch::Contains("gather_rows: row 3 of 3"));
  CHECK_THROWS_WITH(run_op(c, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& b) {
                             ops.combine_rows(s, b[x], b[slots], Tensor(), b[y]);
                           }),
                    Catch::Contains("combine_rows: row 4 of 3"));
}

TEST_CASE("sort_by_expert, combine_rows and gather_rows leave out what is below 0", "[op]") {
  const auto [T, K, E, R] = GENERATE(table<int64_t, int64_t, int64_t, int64_t>(
      {{1, 1, 1, 3}, {6, 3, 4, 40}, {700, 6, 9, 2500}, {9001, 4, 16, 40000}}));
  CAPTURE(T, K, E, R);
  OpCase c(45);
  std::vector<double> choices(static_cast<size_t>(T * K));
  int64_t chosen = 0;
  for (size_t i = 0; i < choices.size(); ++i) {
    choices[i] =
        static_cast<double>(i * 7919 % static_cast<size_t>(2 * E + 1)) - static_cast<double>(E + 1);
    if (choices[i] >= 0)
      ++chosen;
    else
      choices[i] = -1;
  }
  const int64_t D = 8;
  const Slot indices = c.fixed(DType::i32, {T, K}, choices), weights = c.stat(c.normal({T, K}));
  const Slot offsets = c.output(DType::i32, {E + 1}), token_of_row = c.output(DType::i32, {R});
  const Slot row_of_slot = c.output(DType::i32, {T, K}), row_weight = c.stat(c.output({R}));
  const Slot x = c.normal({T, D}), y = c.normal({R, D}), sum = c.output({T, D});
  const Slot back =
      c.stat(c.values({T * K, 1}, std::vector<double>(static_cast<size_t>(T * K), 3)));
  const Slot sums = c.stat(c.output({T * K, 1}));
  const Bound b = check_op(c,
                           [&, t_count = T, k = K, r = R](Ops& ops, Stream& s, const Bound& t) {
                             ops.sort_by_expert(s, t[indices], t[weights], t[offsets],
                                                t[token_of_row], t[row_of_slot], t[row_weight]);
                             ops.combine_rows(s, t[y], t[row_of_slot], t[x], t[sum]);
                             const Tensor slots = t[row_of_slot].view({t_count * k});
                             const Tensor column = t[row_weight].view({r, 1});
                             ops.gather_rows(s, column, slots, t[back]);
                             ops.combine_rows(s, column, slots.view({t_count * k, 1}), {}, t[sums]);
                           },
                           {{row_weight, {.expect_exact_zero = chosen == 0}},
                            {sum, {.sum_length = K + 1, .roundings = 2}},
                            {back, {}},
                            {sums, {.expect_exact_zero = chosen == 0}}});
  std::vector<int64_t> order;
  for (int64_t e = 0; e < E; ++e)
    for (int64_t slot = 0; slot < T * K; ++slot)
      if (static_cast<int64_t>(choices[static_cast<size_t>(slot)]) == e) order.push_back(slot);
  std::vector<double> rows(static_cast<size_t>(R)), slots(static_cast<size_t>(T * K), -1);
  for (size_t r = 0; r < order.size(); ++r) {
    rows[r] = static_cast<double>(order[r] / K);
    slots[static_cast<size_t>(order[r])] = static_cast<double>(r);
  }
  CHECK(b.at(token_of_row).values() == rows);
  CHECK(b.at(row_of_slot).values() == slots);
  CHECK(b.at(offsets).get(E) == static_cast<double>(chosen));
  bool same = true;
  for (int64_t slot = 0; slot < T * K; ++slot) {
    const bool has = slots[static_cast<size_t>(slot)] >= 0;
    same = same && b.at(back).get(slot) == (has ? b.at(weights).get(slot) : 3) &&
           b.at(sums).get(slot) == (has ? b.at(weights).get(slot) : 0);
  }
  for (int64_t r = chosen; r < R; ++r) same = same && b.at(row_weight).get(r) == 0;
  CHECK(same);
  for (int64_t t = 0; t < T; ++t) {
    double want = b.at(x).get(t * D + 3);
    for (int64_t k = 0; k < K; ++k)
      if (const double r = slots[static_cast<size_t>(t * K + k)]; r >= 0)
        want += b.at(y).get(static_cast<int64_t>(r) * D + 3);
    same = same && std::abs(b.at(sum).get(t * D + 3) - want) < 1e-12;
  }
  CHECK(same);
}

namespace {

// Tokens of N ranks with K different choices among E experts; some experts are seldom chosen.
std::vector<int64_t> random_choices(int64_t tokens, int64_t K, int64_t E, uint64_t seed) {
  std::vector<int64_t> all;
  uint64_t state = seed;
  for (int64_t t = 0; t < tokens; ++t)
    for (size_t first = all.size(); std::ssize(all) < (t + 1) * K;) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const auto draw = static_cast<int64_t>(state >> 33);
      const int64_t expert = draw % 3 == 0 ? draw / 3 % E : draw / 3 % std::min(E, 2 * K);
      if (std::find(all.begin() + static_cast<int64_t>(first), all.end(), expert) == all.end())
        all.push_back(expert);
    }
  return all;
}

}  // namespace

TEST_CASE("address_tokens sends each token once to each rank of its choice", "[op]") {
  // Ranks, experts, tokens, choices, choices of a round.
  const auto [N, E, T, K, window] =
      GENERATE(table<int64_t, int64_t, int64_t, int64_t, int64_t>({{1, 4, 5, 2, 100},
                                                                   {2, 8, 40, 3, 200},
                                                                   {2, 8, 40, 3, 17},
                                                                   {4, 64, 700, 6, 6300},
                                                                   {4, 64, 700, 6, 1111},
                                                                   {3, 6, 300, 5, 1},
                                                                   {40, 80, 520, 4, 2080}}));
  CAPTURE(N, E, T, K, window);
  const int64_t L = E / N, X = E + N, slots = T * K;
  const std::vector<int64_t> chosen = random_choices(N * T, K, E, 9);
  std::vector<double> counts(static_cast<size_t>(N * X));
  for (int64_t token = 0; token < N * T; ++token) {
    std::vector<bool> counted(static_cast<size_t>(N));
    for (int64_t k = 0; k < K; ++k) {
      const int64_t expert = chosen[static_cast<size_t>(token * K + k)], source = token / T;
      counts[static_cast<size_t>(source * X + expert)] += 1;
      if (!counted[static_cast<size_t>(expert / L)])
        counts[static_cast<size_t>(source * X + E + expert / L)] += 1;
      counted[static_cast<size_t>(expert / L)] = true;
    }
  }
  const int64_t rank = N / 2, Z = T * std::min(N, K), begin = rank * slots;
  int64_t most = 0;  // choices on their way to a rank
  for (int64_t d = 0; d < N; ++d)
    most = std::max<int64_t>(most, std::count_if(chosen.begin(), chosen.end(),
                                                 [&, l = L](int64_t e) { return e / l == d; }));
  const int64_t rounds = (most + window - 1) / window, step = std::max<int64_t>(1, rounds / 7);
  std::vector<double> own(chosen.begin() + begin, chosen.begin() + begin + slots);
  for (int64_t round = 0; round < rounds; round += step) {
    OpCase c(46);
    const Slot indices = c.fixed(DType::i32, {T, K}, own);
    const Slot table = c.fixed(DType::i64, {N, X}, counts), sent = c.output(DType::i32, {Z});
    const Slot rows = c.output(DType::i32, {T, N}), experts = c.output(DType::i32, {Z, K});
    const Slot tokens = c.fixed(DType::i64, {N}, std::vector<double>(static_cast<size_t>(N), 2));
    const Bound b = check_op(c,
                             [&, l = L, w = window](Ops& ops, Stream& s, const Bound& t) {
                               ops.address_tokens(s, t[indices], t[table], rank, round, w, t[sent],
                                                  t[rows], t[experts]);
                               ops.count_tokens_by_rank(s, t[indices], l, t[tokens]);
                             },
                             {});
    std::vector<double> want_sent(static_cast<size_t>(Z), -1),
        want_rows(static_cast<size_t>(T * N), -1), want_experts(static_cast<size_t>(Z * K), -1);
    int64_t first_row = 0;
    for (int64_t d = 0; d < N; ++d) {
      CHECK(b.at(tokens).get(d) == 2 + counts[static_cast<size_t>(rank * X + E + d)]);
      int64_t number = 0, in_round = 0;  // choices of all sources, of ours in the round
      std::vector<std::pair<int64_t, int64_t>> carried;  // token, and which of those for the rank
      int64_t met = 0;
      for (int64_t token = 0; token < (rank + 1) * T; ++token) {
        bool first = true;
        for (int64_t k = 0; k < K; ++k) {
          if (chosen[static_cast<size_t>(token * K + k)] / L != d) continue;
          const bool now = number / window == round;
          ++number;
          if (token < rank * T) continue;
          if (now) ++in_round;
          if (first && now) carried.emplace_back(token - rank * T, met);
          if (first) ++met;
          first = false;
        }
      }
      const int64_t count =
          std::min(in_round, static_cast<int64_t>(counts[static_cast<size_t>(rank * X + E + d)]));
      REQUIRE(std::ssize(carried) <= count);
      for (const auto& [t, nth] : carried) {
        const int64_t row = first_row + nth % count;
        want_sent[static_cast<size_t>(row)] = static_cast<double>(t);
        want_rows[static_cast<size_t>(t * N + d)] = static_cast<double>(row);
        for (int64_t k = 0; k < K; ++k)
          if (const auto e = static_cast<int64_t>(own[static_cast<size_t>(t * K + k)]); e / L == d)
            want_experts[static_cast<size_t>(row * K + k)] = static_cast<double>(e - d * L);
      }
      first_row += count;
    }
    CHECK(b.at(sent).values() == want_sent);
    CHECK(b.at(rows).values() == want_rows);
    CHECK(b.at(experts).values() == want_experts);
  }
}

}  // namespace dstrain::test
