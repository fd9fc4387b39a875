#include <cmath>
#include <limits>

#include "core/base/rng.h"
#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {

TEST_CASE("fill: every type, and only the columns of a strided view", "[op]") {
  for (const DType dtype :
       {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64, DType::u8, DType::u16}) {
    OpCase c(81);
    const Slot x = c.fixed(dtype, {40003}, std::vector<double>(40003, 1));
    const Bound b = run_op(c, DType::f32, 2,
                           [&](Ops& ops, Stream& s, const Bound& t) { ops.fill(s, t[x], 7); });
    CHECK(b.at(x).values() == std::vector<double>(40003, 7));
  }
  OpCase c(82);
  const Slot x = c.values({2, 4}, {1, 2, 3, 4, 5, 6, 7, 8});
  const Bound b = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.fill(s, t[x].columns(1, 3), 0);
  });
  CHECK(b.at(x).values() == std::vector<double>{1, 0, 0, 4, 5, 0, 0, 8});
}

TEST_CASE("add: into a third tensor, in place, strided", "[op]") {
  const int64_t n = GENERATE(0, 1, 33, 50000);
  OpCase c(83);
  const Slot a = c.normal({n}), d = c.normal({n}), out = c.output({n});
  const Bound b = check_op(c,
                           [&](Ops& ops, Stream& s, const Bound& t) {
                             ops.add(s, t[a], t[d], t[out]);
                             ops.add(s, t[a], t[d], t[d]);
                           },
                           {{out, {}}, {d, {}}});
  CHECK(b.at(out).same_bits(b.at(d)));
  for (int64_t i = 0; i < std::min<int64_t>(n, 40); ++i) {
    CHECK(b.at(out).get(i) == b.at(a).get(i) + c.bind(DType::f64).at(d).get(i));
  }

  OpCase strided(84);
  const Slot x = strided.values({2, 3}, {1, 2, 3, 4, 5, 6}),
             y = strided.values({2, 2}, {1, 1, 1, 1});
  const Bound e = run_op(strided, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.add(s, t[x].columns(1, 3), t[y], t[x].columns(1, 3));
  });
  CHECK(e.at(x).values() == std::vector<double>{1, 3, 4, 4, 6, 7});
}

TEST_CASE("add: sums in S of what is F, rounded once", "[op]") {
  const auto [wide, begin, end] =
      GENERATE(table<int64_t, int64_t, int64_t>({{40, 0, 40}, {2112, 16, 2101}, {7, 1, 6}}));
  CAPTURE(wide, begin, end);
  OpCase c(92);
  const Slot a = c.normal({5, wide}), b = c.normal({5, end - begin}), out = c.normal({5, wide});
  const Slot sum = c.stat(c.normal({5, wide}));
  const auto part = [begin = begin, end = end](const Tensor& x) { return x.columns(begin, end); };
  check_op(c,
           [&](Ops& ops, Stream& s, const Bound& t) {
             ops.add(s, part(t[a]), t[b], part(t[sum]));
             ops.add(s, part(t[sum]), t[b], part(t[sum]));
             ops.add(s, part(t[sum]), part(t[a]), part(t[out]));
             ops.add(s, part(t[sum]), t[b], t[b]);
           },
           {{sum, {}}, {out, {}}, {b, {}}});
}

TEST_CASE("fill, add, convert: rows of wider matrices", "[op]") {
  const auto [begin, columns] = GENERATE(table<int64_t, int64_t>({{16, 2085}, {3, 70}, {8, 64}}));
  CAPTURE(begin, columns);
  const int64_t rows = 5, wide = 2112, end = begin + columns;
  OpCase c(91);
  const Slot a = c.normal({rows, wide}), d = c.normal({rows, columns});
  const Slot sum = c.normal({rows, wide}), filled = c.normal({rows, wide});
  const Slot converted = c.stat(c.normal({rows, wide}));
  check_op(c,
           [&](Ops& ops, Stream& s, const Bound& t) {
             ops.add(s, t[a].columns(begin, end), t[d], t[sum].columns(begin, end));
             ops.fill(s, t[filled].columns(begin, end), -3);
             ops.convert(s, t[a].columns(begin, end), t[converted].columns(begin, end));
           },
           {{sum, {}}, {filled, {}}, {converted, {}}});
}

TEST_CASE("add and convert: shapes that differ are named", "[ops]") {
  OpCase c(85);
  const Slot x = c.normal({2, 3}), y = c.normal({2, 2});
  const auto run = [&](const OpBody& body) { run_op(c, DType::f32, 1, body); };
  CHECK_THROWS_WITH(run([&](Ops& ops, Stream& s, const Bound& t) { ops.add(s, t[x], t[y], t[x]); }),
                    Catch::Contains("add: shapes differ, f32[2, 2] and f32[2, 3]"));
  CHECK_THROWS_WITH(run([&](Ops& ops, Stream& s, const Bound& t) { ops.convert(s, t[x], t[y]); }),
                    Catch::Contains("convert: shapes differ"));
}

TEST_CASE("convert: all pairs of types, bf16 to the nearest even", "[op]") {
  const double inf = std::numeric_limits<double>::infinity();
  // 1 + 2^-8 lies between two bf16 numbers; so does 1 + 3 * 2^-8, whose even neighbour is above.
  // The f64 value just above the first tie must not be rounded down through f32. 3.4e38 exceeds
  // bf16.
  std::vector<double> values{0,
                             -0.0,
                             1,
                             -2.5,
                             1 + 0x1p-8,
                             1 + 3 * 0x1p-8,
                             1 + 0x1p-8 + 0x1p-40,
                             -(1 + 0x1p-8 + 0x1p-40),
                             1 + 0x1p-8 - 0x1p-40,
                             3.4e38,
                             -3.4e38,
                             1e-40,
                             inf,
                             -inf,
                             0x1p-140,
                             3.38953139e38};
  for (uint64_t i = 0; i < 9000; ++i) {
    values.push_back(random_normal(85, 0, i) * std::pow(10, 4 * random_normal(85, 1, i)));
  }
  const auto n = static_cast<int64_t>(values.size());
  for (const DType from : {DType::f32, DType::f64, DType::bf16}) {
    for (const DType to : {DType::f32, DType::f64, DType::bf16}) {
      OpCase c(86);
      const Slot x = c.fixed(from, {n}, values), y = c.output(to, {n});
      const Bound b = run_op(c, DType::f32, 2, [&](Ops& ops, Stream& s, const Bound& t) {
        ops.convert(s, t[x], t[y]);
      });
      const HostTensor expected(to, {n}, b.at(x).values());
      for (int64_t i = 0; i < n; ++i) {
        CAPTURE(dtype_name(from), dtype_name(to), i, b.at(x).get(i));
        REQUIRE(b.at(y).get(i) == expected.get(i));
      }
    }
  }
}

TEST_CASE("convert: NaN stays NaN, strided rows", "[op]") {
  OpCase c(87);
  const Slot x = c.fixed(DType::f32, {2, 3}, {std::nan(""), 1, 2, 3, 4, 5});
  const Slot y = c.output(DType::bf16, {2, 2});
  const Bound b = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.convert(s, t[x].columns(0, 2), t[y]);
  });
  CHECK(std::isnan(b.at(y).get(0)));
  CHECK(b.at(y).get(2) == 3);
}

TEST_CASE("bias: f32 agrees with f64, gradient, accumulation", "[op]") {
  const auto [T, D] = GENERATE(table<int64_t, int64_t>(
      {{0, 3}, {1, 1}, {5, 7}, {1000, 33}, {130, 264}, {3000, 300}, {33000, 3}}));
  OpCase c(88);
  const Slot x = c.normal({T, D}), bias = c.normal({D}), dy = c.normal({T, D});
  const Slot dbias = c.stat(c.output({D})), sum = c.stat(c.normal({D}));
  const Bound before = c.bind(DType::f64);
  const Bound b = check_op(c,
                           [&](Ops& ops, Stream& s, const Bound& t) {
                             ops.add_bias(s, t[x], t[bias]);
                             ops.bias_backward(s, t[dy], Accumulate::overwrite, t[dbias]);
                             ops.bias_backward(s, t[dy], Accumulate::add, t[sum]);
                           },
                           {{x, {}},
                            {dbias, {.sum_length = T, .expect_exact_zero = T == 0}},
                            {sum, {.sum_length = T + 1}}});
  for (int64_t d = 0; d < std::min<int64_t>(D, 8); ++d) {
    double column = 0;
    for (int64_t t = 0; t < T; ++t) column += b.at(dy).get(t * D + d);
    CHECK(b.at(dbias).get(d) == Approx(column).margin(1e-12));
    CHECK(b.at(sum).get(d) == Approx(before.at(sum).get(d) + column).margin(1e-12));
    if (T > 0) {
      CHECK(b.at(x).get(d) == before.at(x).get(d) + before.at(bias).get(d));
    }
  }
}

TEST_CASE("fill_normal depends on the global index only", "[op]") {
  // A tensor [3, 10, 4] cut along its second dim.
  const int64_t outer = 3, global = 10, inner = 4, begin = 2, extent = 5;
  OpCase c(89);
  const Slot whole = c.output({outer * global * inner}), part = c.output({outer, extent, inner});
  const Slot flat = c.output({outer * global * inner});
  const Bound b =
      check_op(c,
               [&](Ops& ops, Stream& s, const Bound& t) {
                 ops.fill_normal(s, t[whole], 5, 6, 0.25, {outer, global, 0, global, inner});
                 ops.fill_normal(s, t[part], 5, 6, 0.25, {outer, global, begin, extent, inner});
                 ops.fill_normal(s, t[flat], 5, 6, 0.25, {1, 1, 0, 1, outer * global * inner});
               },
               {{whole, {}}, {part, {}}, {flat, {}}});
  CHECK(b.at(whole).same_bits(b.at(flat)));
  for (int64_t i = 0; i < outer * global * inner; ++i) {
    CHECK(b.at(whole).get(i) == 0.25 * random_normal(5, 6, static_cast<uint64_t>(i)));
    const int64_t o = i / (global * inner), e = i / inner % global - begin, k = i % inner;
    if (e < 0 || e >= extent) continue;
    CHECK(b.at(part).get((o * extent + e) * inner + k) == b.at(whole).get(i));
  }
}

TEST_CASE("fill_normal: mean and variance", "[op]") {
  const int64_t n = 100000;
  OpCase c(90);
  const Slot x = c.output({n});
  const Bound b = run_op(c, DType::f32, 2, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.fill_normal(s, t[x], 1, 2, 2.0, {1, 1, 0, 1, n});
  });
  double sum = 0, squares = 0;
  for (const double value : b.at(x).values()) {
    sum += value;
    squares += value * value;
  }
  CHECK(sum / n == Approx(0).margin(0.02));
  CHECK(squares / n == Approx(4).epsilon(0.02));
}

}  // namespace dstrain::test
