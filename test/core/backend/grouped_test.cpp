// Grouped products and the gated feed-forward at sizes that take several tiles on a GPU, in groups
// of all sizes, among rows that belong to no group.
#include <vector>

#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

// Rows before the first group and after the last belong to nobody: what lies there must stay, and
// their index is no row.
struct Groups {
  int64_t E, R;
  std::vector<double> offsets, index;

  Groups(std::vector<double> bounds, int64_t rows, int64_t sources)
      : E(static_cast<int64_t>(bounds.size()) - 1), R(rows), offsets(std::move(bounds)) {
    constexpr double kNoRow = 1 << 30;
    for (int64_t r = 0; r < R; ++r) {
      const bool owned =
          static_cast<double>(r) >= offsets.front() && static_cast<double>(r) < offsets.back();
      index.push_back(owned ? static_cast<double>((r * 7 + 3) % sources) : kNoRow);
    }
  }
};

// 40 groups of 0 to 20 rows: more than a warp, and more tiles than a GPU computes at a time.
Groups many_groups(int64_t sources) {
  std::vector<double> bounds = {5};
  for (int64_t e = 0; e < 40; ++e)
    bounds.push_back(bounds.back() + static_cast<double>(e * 13 % 21));
  const int64_t rows = static_cast<int64_t>(bounds.back()) + 2;
  return Groups(std::move(bounds), rows, sources);
}

TEST_CASE("grouped products: groups of many sizes among rows that belong to none",
          "[core][op][large]") {
  constexpr int64_t X = 150;
  const auto [many, O, I] = GENERATE(
      table<bool, int64_t, int64_t>({{false, 264, 80},  // rows of whole vectors: Hopper kernels
                                     {false, 200, 328},
                                     {true, 520, 72},
                                     {false, 72, 67}}));  // rows that are not
  const bool indexed = GENERATE(false, true);
  const Accumulate accumulate = GENERATE(Accumulate::overwrite, Accumulate::add);
  CAPTURE(many, O, I, indexed, accumulate);
  const Groups g = many ? many_groups(X) : Groups({3, 403, 403, 404, 690}, 700, X);
  OpCase c(51);
  const int64_t sources = indexed ? X : g.R;
  const Slot offsets = c.fixed(DType::i32, {g.E + 1}, g.offsets);
  const Slot index = indexed ? c.fixed(DType::i32, {g.R}, g.index) : Slot{};
  const Slot x = c.normal({sources, I}), dy = c.normal({sources, O}),
             weight = c.normal({g.E, O, I});
  const Slot y = c.normal({g.R, O}), dx = c.normal({g.R, I});
  const Slot dweight = c.stat(c.normal({g.E, O, I}));
  check_op(c,
           [=](Ops& ops, Stream& s, const Bound& t) {
             ops.grouped_matmul(s, t[x], t[index], t[weight], t[offsets], t[y]);
             ops.grouped_matmul_backward_input(s, t[dy], t[index], t[weight], t[offsets], t[dx]);
             ops.grouped_matmul_backward_weight(s, t[dy], t[index], t[x], t[index], t[offsets],
                                                accumulate, t[dweight]);
           },
           {{y, {.sum_length = I}},
            {dx, {.sum_length = O}},
            {dweight, {.sum_length = 401, .roundings = 1}}});
}

TEST_CASE("feed-forward: groups of many sizes among rows that belong to none", "[core][op]") {
  constexpr int64_t X = 150;
  const auto [many, D, I] =
      GENERATE(table<bool, int64_t, int64_t>({{false, 72, 136}, {true, 136, 72}, {false, 33, 37}}));
  CAPTURE(many, D, I);
  const Groups g = many ? many_groups(X) : Groups({3, 403, 403, 404, 690}, 700, X);
  OpCase c(52);
  const Slot offsets = c.fixed(DType::i32, {g.E + 1}, g.offsets);
  const Slot index = c.fixed(DType::i32, {g.R}, g.index);
  const Slot x = c.normal({X, D}), dy = c.normal({X, D});
  const Slot up = c.normal({g.E, 2 * I, D}, 0.3), down = c.normal({g.E, D, I}, 0.3);
  const Slot row_weight = c.stat(c.uniform({g.R}, 0.1, 1)), drow_weight = c.stat(c.normal({g.R}));
  const Slot gate_up = c.normal({g.R, 2 * I}), dgate_up = c.normal({g.R, 2 * I});
  const Slot h = c.normal({g.R, I}), h_again = c.normal({g.R, I});
  check_op(c,
           [=](Ops& ops, Stream& s, const Bound& t) {
             ops.ffn_up(s, t[x], t[index], t[up], t[offsets], t[row_weight], t[gate_up], t[h]);
             ops.ffn_down_backward_input(s, t[dy], t[index], t[down], t[offsets], t[gate_up],
                                         t[row_weight], t[dgate_up], t[h_again], t[drow_weight]);
           },
           {{gate_up, {.sum_length = D}},
            {h, {.sum_length = D, .roundings = 8, .bf16_roundings = 2}},
            {h_again, {.sum_length = D, .roundings = 8, .bf16_roundings = 2}},
            {dgate_up, {.sum_length = 2 * D, .roundings = 12, .bf16_roundings = 2}},
            {drow_weight, {.sum_length = 2 * D + I, .roundings = 12, .bf16_roundings = 3}}});
}

TEST_CASE("grouped products: one group of gathered rows without offsets", "[core][op]") {
  const int64_t O = GENERATE(24, 7), I = 40, R = 150, X = 60;
  OpCase c(53);
  std::vector<double> rows;
  for (int64_t r = 0; r < R; ++r) rows.push_back(static_cast<double>(r * 11 % X));
  const Slot index = c.fixed(DType::i32, {R}, rows);
  const Slot x = c.normal({X, I}), dy = c.normal({X, O}), weight = c.normal({1, O, I});
  const Slot y = c.output({R, O}), dx = c.output({R, I}), dweight = c.stat(c.output({1, O, I}));
  check_op(c,
           [=](Ops& ops, Stream& s, const Bound& t) {
             ops.grouped_matmul(s, t[x], t[index], t[weight], {}, t[y]);
             ops.grouped_matmul_backward_input(s, t[dy], t[index], t[weight], {}, t[dx]);
             ops.grouped_matmul_backward_weight(s, t[dy], t[index], t[x], t[index], {},
                                                Accumulate::overwrite, t[dweight]);
           },
           {{y, {.sum_length = I}}, {dx, {.sum_length = O}}, {dweight, {.sum_length = R}}});
}

TEST_CASE("grouped products: columns of wider matrices", "[core][op]") {
  constexpr int64_t E = 2, R = 200, O = 72, I = 40;
  OpCase c(54);
  const Slot offsets = c.fixed(DType::i32, {E + 1}, {0, 140, 200});
  const Slot x = c.normal({R, 3 * I}), y = c.normal({R, 2 * O}), dx = c.normal({R, 3 * I});
  const Slot weight = c.normal({E, O, I}), dweight = c.stat(c.output({E, O, I}));
  check_op(c,
           [=](Ops& ops, Stream& s, const Bound& t) {
             const Tensor x_RI = t[x].columns(I, 2 * I), y_RO = t[y].columns(O, 2 * O);
             ops.grouped_matmul(s, x_RI, {}, t[weight], t[offsets], y_RO);
             ops.grouped_matmul_backward_input(s, y_RO, {}, t[weight], t[offsets],
                                               t[dx].columns(I, 2 * I));
             ops.grouped_matmul_backward_weight(s, t[y].columns(0, O), {}, x_RI, {}, t[offsets],
                                                Accumulate::overwrite, t[dweight]);
           },
           {{y, {.sum_length = I}},
            {dx, {.sum_length = I + O, .roundings = 1}},
            {dweight, {.sum_length = 140}}});
}

}  // namespace
}  // namespace dstrain::test
