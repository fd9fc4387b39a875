// Plain and grouped matrix products against sums in double, f64 and threads; cut and log of
// products.
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "core/backend/cpu_gemm.h"
#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

double element(const HostTensor& x, Trans trans, int64_t columns, int64_t i, int64_t j) {
  return trans == Trans::yes ? x.get(j * columns + i) : x.get(i * columns + j);
}

// alpha op(a) op(b) + beta c, each sum in double.
HostTensor product(const HostTensor& a, Trans ta, const HostTensor& b, Trans tb, int64_t m,
                   int64_t n, int64_t k, double alpha, const HostTensor* c, double beta) {
  HostTensor out(DType::f64, {m, n});
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        sum += element(a, ta, ta == Trans::yes ? m : k, i, p) *
               element(b, tb, tb == Trans::yes ? k : n, p, j);
      }
      out.set(i * n + j, alpha * sum + (c ? beta * c->get(i * n + j) : 0));
    }
  }
  return out;
}

TEST_CASE("matmul: every transposition and shape", "[core][op]") {
  const Trans ta = GENERATE(Trans::no, Trans::yes), tb = GENERATE(Trans::no, Trans::yes);
  const auto [m, n, k] = GENERATE(table<int64_t, int64_t, int64_t>(
      {{1, 1, 1}, {3, 5, 7}, {1, 300, 40}, {65, 33, 130}, {130, 700, 70}, {400, 48, 129}}));
  CAPTURE(ta, tb, m, n, k);
  OpCase c(11);
  const Slot a = c.normal(ta == Trans::yes ? std::vector{k, m} : std::vector{m, k});
  const Slot b = c.normal(tb == Trans::yes ? std::vector{n, k} : std::vector{k, n});
  const Slot fresh = c.output({m, n}), added = c.normal({m, n});
  const Bound before = c.bind(DType::f64);
  const Bound f64 = check_op(
      c,
      [=](Ops& ops, Stream& s, const Bound& t) {
        ops.matmul(s, ta, tb, 0.5, t[a], t[b], 0, t[fresh]);  // what was NaN must not matter
        ops.matmul(s, ta, tb, 2, t[a], t[b], -1, t[added]);
      },
      {{fresh, {.sum_length = k}}, {added, {.sum_length = k + 1, .roundings = 1}}});
  CHECK(compare_within(f64.at(fresh),
                       product(f64.at(a), ta, f64.at(b), tb, m, n, k, 0.5, nullptr, 0), 1e-13));
  CHECK(compare_within(f64.at(added),
                       product(f64.at(a), ta, f64.at(b), tb, m, n, k, 2, &before.at(added), -1),
                       1e-13));
}

TEST_CASE("matmul: operands and results that are statistics, as the router and gradients have them",
          "[core][op]") {
  const auto [T, E, D] = GENERATE(table<int64_t, int64_t, int64_t>(
      {{0, 4, 8}, {1, 1, 1}, {37, 5, 19}, {130, 64, 72}, {300, 16, 256}}));
  CAPTURE(T, E, D);
  OpCase c(15);
  const Slot x = c.normal({T, D}), weight = c.normal({E, D}), dx = c.normal({T, D});
  const Slot logits = c.stat(c.output({T, E})), dlogits = c.stat(c.normal({T, E}));
  const Slot dweight = c.stat(c.output({E, D})), summed = c.stat(c.normal({E, D}));
  const Slot dy = c.normal({T, E}), plain = c.stat(c.normal({E, D}));
  const bool zero = T == 0;
  check_op(c,
           [=](Ops& ops, Stream& s, const Bound& t) {
             ops.matmul(s, Trans::no, Trans::yes, 1, t[x], t[weight], 0, t[logits]);
             ops.matmul(s, Trans::yes, Trans::no, 1, t[dlogits], t[x], 0, t[dweight]);
             ops.matmul(s, Trans::yes, Trans::no, 1, t[dlogits], t[x], 1, t[summed]);
             ops.matmul(s, Trans::yes, Trans::no, 1, t[dy], t[x], 1, t[plain]);
             ops.matmul(s, Trans::no, Trans::no, 1, t[dlogits], t[weight], 1, t[dx]);
           },
           {{logits, {.sum_length = D}},
            {dweight, {.sum_length = T, .expect_exact_zero = zero}},
            {summed, {.sum_length = T + 1, .roundings = 1}},
            {plain, {.sum_length = T + 1, .roundings = 1}},
            {dx, {.sum_length = E + 1, .roundings = 1}}});
}

TEST_CASE("matmul: columns of wider matrices", "[core][op]") {
  OpCase c(12);
  const Slot a = c.normal({70, 90}), b = c.normal({60, 80}),
             out = c.values({70, 100}, std::vector<double>(7000, 5));
  const Bound f64 = check_op(c,
                             [=](Ops& ops, Stream& s, const Bound& t) {
                               ops.matmul(s, Trans::no, Trans::yes, 1, t[a].columns(10, 40),
                                          t[b].columns(50, 80), 0, t[out].columns(20, 80));
                             },
                             {{out, {.sum_length = 30}}});
  double worst = 0;
  for (int64_t i = 0; i < 70; ++i) {
    for (int64_t j = 0; j < 100; ++j) {
      double expected = 5;
      if (j >= 20 && j < 80) {
        expected = 0;
        for (int64_t p = 0; p < 30; ++p)
          expected += f64.at(a).get(i * 90 + 10 + p) * f64.at(b).get((j - 20) * 80 + 50 + p);
      }
      worst = std::max(worst, std::fabs(f64.at(out).get(i * 100 + j) - expected));
    }
  }
  CHECK(worst < 1e-12);
}

TEST_CASE("matmul: empty operands", "[core][op]") {
  OpCase c(13);
  const Slot a = c.normal({4, 0}), b = c.normal({0, 3}), out = c.normal({4, 3});
  const Slot none = c.output({0, 3}), no_rows = c.normal({0, 4}), four = c.normal({4, 3});
  const Bound before = c.bind(DType::f64);
  const auto body = [=](Ops& ops, Stream& s, const Bound& t) {
    ops.matmul(s, Trans::no, Trans::no, 1, t[a], t[b], 0.5, t[out]);
    ops.matmul(s, Trans::no, Trans::no, 1, t[no_rows], t[four], 0, t[none]);
  };
  const Bound after = check_op(c, body, {{out, {}}});
  for (int64_t i = 0; i < 12; ++i) CHECK(after.at(out).get(i) == 0.5 * before.at(out).get(i));
}

TEST_CASE("matmul: shapes that do not fit are refused", "[core][ops]") {
  OpCase c(14);
  const Slot a = c.normal({4, 5}), b = c.normal({6, 3}), out = c.output({4, 3});
  CHECK_THROWS(run_op(c, DType::f32, 1, [=](Ops& ops, Stream& s, const Bound& t) {
    ops.matmul(s, Trans::no, Trans::no, 1, t[a], t[b], 0, t[out]);
  }));
}

// Rows in groups of uneven size, one of them empty, with an index into more or fewer rows.
struct Grouped {
  OpCase c;
  int64_t E, O, I, R, X;
  std::vector<double> offsets, index;

  Grouped(uint64_t seed, std::vector<double> ends, int64_t X_, int64_t O_, int64_t I_)
      : c(seed),
        E(static_cast<int64_t>(ends.size())),
        O(O_),
        I(I_),
        R(static_cast<int64_t>(ends.back())),
        X(X_) {
    offsets = {0};
    offsets.insert(offsets.end(), ends.begin(), ends.end());
    for (int64_t r = 0; r < R; ++r) index.push_back(static_cast<double>((r * 7 + 3) % X));
  }
  int64_t group_of(int64_t r) const {
    int64_t e = 0;
    while (static_cast<double>(r) >= offsets[static_cast<size_t>(e + 1)]) ++e;
    return e;
  }
  int64_t source(bool indexed, int64_t r) const {
    return indexed ? static_cast<int64_t>(index[static_cast<size_t>(r)]) : r;
  }
};

Grouped make_grouped(int which) {
  switch (which) {
    case 0:
      return Grouped(21, {5, 5, 6, 20}, 9, 7, 11);
    case 1:
      return Grouped(22, {0, 0, 0}, 4, 3, 2);
    case 2:
      return Grouped(23, {1}, 1, 1, 1);
    default:
      return Grouped(24, {700, 730, 730, 1100, 1101, 1400}, 350, 66, 40);
  }
}

TEST_CASE("grouped_matmul and its backward_input: rows use their group's weight", "[core][op]") {
  Grouped g = make_grouped(GENERATE(0, 1, 2, 3));
  const bool indexed = GENERATE(false, true);
  CAPTURE(g.R, indexed);
  const int64_t E = g.E, O = g.O, I = g.I, R = g.R;
  const Slot x = g.c.normal({indexed ? g.X : R, I}), dy = g.c.normal({indexed ? g.X : R, O});
  const Slot weight = g.c.normal({E, O, I}), offsets = g.c.fixed(DType::i32, {E + 1}, g.offsets);
  const Slot index = indexed ? g.c.fixed(DType::i32, {R}, g.index) : Slot{};
  const Slot y = g.c.output({R, O}), dx = g.c.output({R, I});
  const Bound f64 = check_op(g.c,
                             [=](Ops& ops, Stream& s, const Bound& t) {
                               ops.grouped_matmul(s, t[x], t[index], t[weight], t[offsets], t[y]);
                               ops.grouped_matmul_backward_input(s, t[dy], t[index], t[weight],
                                                                 t[offsets], t[dx]);
                             },
                             {{y, {.sum_length = I}}, {dx, {.sum_length = O}}});
  HostTensor want_y(DType::f64, {R, O}), want_dx(DType::f64, {R, I});
  for (int64_t r = 0; r < R; ++r) {
    const int64_t e = g.group_of(r), from = g.source(indexed, r);
    for (int64_t o = 0; o < O; ++o) {
      for (int64_t i = 0; i < I; ++i) {
        const double w = f64.at(weight).get((e * O + o) * I + i);
        want_y.set(r * O + o, want_y.get(r * O + o) + f64.at(x).get(from * I + i) * w);
        want_dx.set(r * I + i, want_dx.get(r * I + i) + f64.at(dy).get(from * O + o) * w);
      }
    }
  }
  CHECK(compare_within(f64.at(y), want_y, 1e-13));
  CHECK(compare_within(f64.at(dx), want_dx, 1e-13));
}

TEST_CASE("grouped_matmul_backward_weight: sums over each group's rows", "[core][op]") {
  Grouped g = make_grouped(GENERATE(0, 1, 2, 3));
  const bool dy_indexed = GENERATE(false, true), x_indexed = GENERATE(false, true);
  const Accumulate accumulate = GENERATE(Accumulate::overwrite, Accumulate::add);
  CAPTURE(g.R, dy_indexed, x_indexed, accumulate);
  const int64_t E = g.E, O = g.O, I = g.I, R = g.R;
  const Slot dy = g.c.normal({dy_indexed ? g.X : R, O}), x = g.c.normal({x_indexed ? g.X : R, I});
  const Slot offsets = g.c.fixed(DType::i32, {E + 1}, g.offsets);
  const Slot index = g.c.fixed(DType::i32, {R}, g.index);
  const bool add = accumulate == Accumulate::add;
  const Slot dweight = g.c.stat(add ? g.c.normal({E, O, I}) : g.c.output({E, O, I}));
  const Bound before = g.c.bind(DType::f64);
  const Bound f64 =
      check_op(g.c,
               [=](Ops& ops, Stream& s, const Bound& t) {
                 ops.grouped_matmul_backward_weight(s, t[dy], t[dy_indexed ? index : Slot{}], t[x],
                                                    t[x_indexed ? index : Slot{}], t[offsets],
                                                    accumulate, t[dweight]);
               },
               {{dweight, {.sum_length = R + 1, .expect_exact_zero = R == 0 && !add}}});
  HostTensor want(DType::f64, {E, O, I});
  for (int64_t i = 0; add && i < want.numel(); ++i) want.set(i, before.at(dweight).get(i));
  for (int64_t r = 0; r < R; ++r) {
    const int64_t e = g.group_of(r);
    for (int64_t o = 0; o < O; ++o) {
      for (int64_t i = 0; i < I; ++i) {
        const int64_t at = (e * O + o) * I + i;
        want.set(at, want.get(at) + f64.at(dy).get(g.source(dy_indexed, r) * O + o) *
                                        f64.at(x).get(g.source(x_indexed, r) * I + i));
      }
    }
  }
  if (R == 0 && !add) return;  // the comparison above asked for zeros
  CHECK(compare_within(f64.at(dweight), want, 1e-13));
}

TEST_CASE("grouped products: absent offsets mean one group, gradients agree with differences",
          "[core][ops]") {
  OpCase c(31);
  const Slot x = c.normal({6, 4}), weight = c.normal({1, 5, 4}), y = c.output({6, 5});
  const Slot dy = c.normal({6, 5}), dx = c.output({6, 4}), dweight = c.output({1, 5, 4});
  const auto forward = [=](Ops& ops, Stream& s, const Bound& t) {
    ops.grouped_matmul(s, t[x], {}, t[weight], {}, t[y]);
  };
  const auto backward = [=](Ops& ops, Stream& s, const Bound& t) {
    ops.grouped_matmul_backward_input(s, t[dy], {}, t[weight], {}, t[dx]);
    ops.grouped_matmul_backward_weight(s, t[dy], {}, t[x], {}, {}, Accumulate::overwrite,
                                       t[dweight]);
  };
  CHECK(check_gradient(c, forward, backward, {{y, dy}}, {{x, dx}, {weight, dweight}}));
  const auto planted_fault = [=](Ops& ops, Stream& s, const Bound& t) {
    backward(ops, s, t);
    t[dweight].data<double>()[7] *= 1.001;
  };
  CHECK_FALSE(check_gradient(c, forward, planted_fault, {{y, dy}}, {{x, dx}, {weight, dweight}}));
}

TEST_CASE("grouped products: rows after the last group are not touched", "[core][op]") {
  OpCase c(32);
  const Slot x = c.normal({10, 4}), weight = c.normal({2, 5, 4}), y = c.output({10, 5});
  const Slot offsets = c.fixed(DType::i32, {3}, {0, 2, 6});
  const Bound after = run_op(c, DType::f32, 2, [=](Ops& ops, Stream& s, const Bound& t) {
    ops.grouped_matmul(s, t[x], {}, t[weight], t[offsets], t[y]);
  });
  CHECK(std::isfinite(after.at(y).get(6 * 5 - 1)));
  for (int64_t i = 30; i < 50; ++i) CHECK(std::isnan(after.at(y).get(i)));
}

TEST_CASE("grouped products: bad offsets are refused", "[core][ops]") {
  const std::vector<double> offsets = GENERATE(
      std::vector<double>{0, 3, 2}, std::vector<double>{0, 3, 11}, std::vector<double>{-1, 3, 4});
  OpCase c(33);
  const Slot x = c.normal({10, 4}), weight = c.normal({2, 5, 4}), y = c.output({10, 5});
  const Slot o = c.fixed(DType::i32, {3}, offsets);
  CHECK_THROWS(run_op(c, DType::f32, 1, [=](Ops& ops, Stream& s, const Bound& t) {
    ops.grouped_matmul(s, t[x], {}, t[weight], t[o], t[y]);
  }));
}

TEST_CASE("plan_tiles: tiles cover the output and respect the limit", "[core][ops]") {
  for (const Trans ta : {Trans::no, Trans::yes}) {
    for (const Trans tb : {Trans::no, Trans::yes}) {
      for (const int64_t m : {1, 63, 500, 20000}) {
        for (const int64_t n : {1, 80, 4096, 129280}) {
          const TilePlan plan = plan_tiles({ta, tb, m, n, 256}, 1, 100);
          REQUIRE(plan.rows <= 100);
          REQUIRE(plan.rows * plan.row_tiles >= m);
          REQUIRE(plan.rows * (plan.row_tiles - 1) < m);
          REQUIRE(plan.columns * plan.column_tiles >= n);
          REQUIRE(plan.columns * (plan.column_tiles - 1) < n);
        }
      }
    }
  }
}

TEST_CASE("the log lists the products of ops, one per group", "[core][ops]") {
  MatmulLog log;
  const auto backend = make_cpu_backend(2, &log);
  const auto stream = backend->make_stream();
  const HostTensor a(DType::f32, {7, 5}), b(DType::f32, {6, 5}), c(DType::f32, {7, 6});
  const HostTensor weight(DType::f32, {3, 6, 5}), offsets(DType::i32, {4}, {0, 2, 2, 7});
  backend->ops().matmul(*stream, Trans::no, Trans::yes, 1, a, b, 0, c);
  backend->ops().grouped_matmul(*stream, a, {}, weight, offsets, c);
  const std::vector<ProductShape> expected = {{Trans::no, Trans::yes, 7, 6, 5},
                                              {Trans::no, Trans::yes, 2, 6, 5},
                                              {Trans::no, Trans::yes, 5, 6, 5}};
  CHECK((log.take() == expected));
  CHECK(log.take().empty());
}

}  // namespace
}  // namespace dstrain::test
