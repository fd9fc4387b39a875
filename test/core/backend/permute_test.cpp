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
  const Slot slots = c.fixed(DType::i32, {1, 2}, {0, -1});
  CHECK_THROWS_WITH(run_op(c, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& b) {
                             ops.gather_rows(s, b[x], b[index], b[y]);
                           }),
                    Catch::Contains("gather_rows: row 3 of 3"));
  CHECK_THROWS_WITH(run_op(c, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& b) {
                             ops.combine_rows(s, b[x], b[slots], Tensor(), b[y]);
                           }),
                    Catch::Contains("combine_rows: row -1 of 3"));
}

TEST_CASE("arrange_arrivals puts the rows of each expert together", "[op]") {
  // Sources, experts of all, of this rank, rows of a round.
  const auto [N, E, L, C] = GENERATE(table<int64_t, int64_t, int64_t, int64_t>(
      {{1, 1, 1, 5}, {2, 8, 4, 40}, {3, 6, 2, 7}, {8, 64, 8, 300}, {2, 130, 65, 9000}}));
  CAPTURE(N, E, L, C);
  const int64_t first_expert = E - L;
  std::vector<double> counts(static_cast<size_t>(N * E));
  for (size_t i = 0; i < counts.size(); ++i)
    counts[i] = i % 3 == 1 ? 0.0 : static_cast<double>((i * 7919) % (C / 2 + 2));
  // Rows on their way to this rank, in the order of arrival: the expert of each.
  std::vector<int64_t> expert_of_row;
  for (int64_t s = 0; s < N; ++s)
    for (int64_t e = 0; e < L; ++e)
      expert_of_row.insert(
          expert_of_row.end(),
          static_cast<size_t>(counts[static_cast<size_t>(s * E + first_expert + e)]), e);
  const int64_t rounds = std::ssize(expert_of_row) / C + 1;
  for (int64_t round = 0; round < rounds; ++round) {
    OpCase c(5);
    const Slot table = c.fixed(DType::i64, {N, E}, counts);
    const Slot order = c.output(DType::i32, {C}), arrival = c.output(DType::i32, {C});
    const Slot offsets = c.output(DType::i32, {L + 1}), only_arrival = c.output(DType::i32, {C}),
               again = c.output(DType::i32, {L + 1});
    const Bound b = check_op(
        c,
        [&](Ops& ops, Stream& s, const Bound& t) {
          ops.arrange_arrivals(s, t[table], first_expert, round, t[order], t[arrival], t[offsets]);
          ops.arrange_arrivals(s, t[table], first_expert, round, {}, t[only_arrival], t[again]);
        },
        {});
    std::vector<double> want_order(static_cast<size_t>(C)), want_arrival(static_cast<size_t>(C)),
        want_offsets(1);
    size_t row = 0;
    for (int64_t e = 0; e < L; ++e) {
      for (int64_t at = 0; at < C && round * C + at < std::ssize(expert_of_row); ++at)
        if (expert_of_row[static_cast<size_t>(round * C + at)] == e) {
          want_order[row] = static_cast<double>(at);
          want_arrival[static_cast<size_t>(at)] = static_cast<double>(row++);
        }
      want_offsets.push_back(static_cast<double>(row));
    }
    CHECK(b.at(order).values() == want_order);
    CHECK(b.at(arrival).values() == want_arrival);
    CHECK(b.at(only_arrival).values() == want_arrival);
    CHECK(b.at(offsets).values() == want_offsets);
    CHECK(b.at(again).values() == want_offsets);
  }
}

}  // namespace dstrain::test
