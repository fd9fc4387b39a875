// T tokens, D columns.
#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

constexpr double kEps = 1e-5;

struct NormCase {
  OpCase c{11};
  int64_t T, D;
  Slot x, delta, weight, dy, dresidual, sum, y, rstd, dx, dweight;

  NormCase(int64_t tokens, int64_t columns) : T(tokens), D(columns) {
    x = c.normal({T, D});
    delta = c.normal({T, D}, 0.5);
    weight = c.normal({D}, 0.2, 1);
    dy = c.normal({T, D});
    dresidual = c.normal({T, D});
    sum = c.output({T, D});
    y = c.output({T, D});
    rstd = c.stat(c.output({T}));
    dx = c.output({T, D});
    dweight = c.stat(c.output({D}));
  }
  void forward(Ops& ops, Stream& s, const Bound& b) const {
    ops.add_rms_norm(s, b[x], b[delta], b[weight], kEps, b[sum], b[y], b[rstd]);
  }
  // From the sum as it is stored: a bf16 reference rounds it after the op that made it.
  void forward_again(Ops& ops, Stream& s, const Bound& b) const {
    ops.add_rms_norm(s, b[sum], Tensor(), b[weight], kEps, Tensor(), b[y], b[rstd]);
  }
  void backward(Ops& ops, Stream& s, const Bound& b) const {
    ops.rms_norm_backward(s, b[dy], b[sum], b[weight], b[rstd], Tensor(), Accumulate::overwrite,
                          b[dx], b[dweight]);
  }
};

}  // namespace

TEST_CASE("rms norm: f32 agrees with f64 and threads do not matter", "[op][large]") {
  const auto [T, D] = GENERATE(table<int64_t, int64_t>({{0, 64},
                                                        {1, 1},
                                                        {3, 129},
                                                        {6, 520},
                                                        {70, 256},
                                                        {2048, 64},
                                                        {9000, 24},
                                                        {1400, 520},
                                                        {400, 2064},
                                                        {3, 2064},
                                                        {5, 7168},
                                                        {2, 12296}}));
  CAPTURE(T, D);
  const NormCase n(T, D);
  check_op(n.c, [&](Ops& ops, Stream& s, const Bound& b) { n.forward(ops, s, b); },
           {{n.sum, {}},
            {n.y, {.sum_length = D, .roundings = 3, .bf16_roundings = 1}},  // of the sum
            {n.rstd, {.sum_length = D, .roundings = 1, .bf16_roundings = 1}}});
  const auto body = [&](Ops& ops, Stream& s, const Bound& b) {
    n.forward(ops, s, b);
    n.forward_again(ops, s, b);
    n.backward(ops, s, b);
  };
  const Tolerance dweight{.sum_length = T * 4, .roundings = 4, .expect_exact_zero = T == 0};
  check_op(n.c, body,
           {{n.y, {.sum_length = D, .roundings = 3}},
            {n.rstd, {.sum_length = D, .roundings = 1}},
            {n.dweight, dweight}});
  if (D > 1) check_op(n.c, body, {{n.dx, {.sum_length = D, .roundings = 6}}});
}

TEST_CASE("rms norm: formula", "[ops]") {
  const NormCase n(2, 3);
  const Bound b = run_op(n.c, DType::f64, 1, [&](Ops& ops, Stream& s, const Bound& bound) {
    n.forward(ops, s, bound);
  });
  for (int64_t t = 0; t < 2; ++t) {
    double squares = 0;
    for (int64_t i = 3 * t; i < 3 * t + 3; ++i) {
      const double sum = b.at(n.x).get(i) + b.at(n.delta).get(i);
      CHECK(b.at(n.sum).get(i) == Approx(sum));
      squares += sum * sum;
    }
    const double rstd = 1 / std::sqrt(squares / 3 + kEps);
    CHECK(b.at(n.rstd).get(t) == Approx(rstd));
    for (int64_t i = 3 * t; i < 3 * t + 3; ++i) {
      CHECK(b.at(n.y).get(i) == Approx(b.at(n.sum).get(i) * rstd * b.at(n.weight).get(i - 3 * t)));
    }
  }
}

TEST_CASE("rms norm: gradients, and a fault turns the check red", "[ops]") {
  const NormCase n(5, 13);
  const auto forward = [&](Ops& ops, Stream& s, const Bound& b) { n.forward(ops, s, b); };
  const auto check = [&](const OpBody& backward) {
    return check_gradient(n.c, forward, backward, {{n.y, n.dy}},
                          {{n.x, n.dx}, {n.delta, n.dx}, {n.weight, n.dweight}});
  };
  const auto backward = [&](Ops& ops, Stream& s, const Bound& b) { n.backward(ops, s, b); };
  CHECK(check(backward));
  CHECK_FALSE(check([&](Ops& ops, Stream& s, const Bound& b) {
    backward(ops, s, b);
    b[n.dx].data<double>()[17] *= 1.001;
  }));
  CHECK_FALSE(check([&](Ops& ops, Stream& s, const Bound& b) {
    backward(ops, s, b);
    b[n.dweight].data<double>()[3] += 1e-4;
  }));
}

TEST_CASE("rms norm: gradient through the residual path", "[ops]") {
  // Both sum and y are used later, so dx = dresidual + d(norm), with dx in place of dresidual.
  const NormCase n(4, 9);
  const auto forward = [&](Ops& ops, Stream& s, const Bound& b) { n.forward(ops, s, b); };
  const auto backward = [&](Ops& ops, Stream& s, const Bound& b) {
    ops.rms_norm_backward(s, b[n.dy], b[n.sum], b[n.weight], b[n.rstd], b[n.dresidual],
                          Accumulate::overwrite, b[n.dresidual], b[n.dweight]);
  };
  CHECK(check_gradient(n.c, forward, backward, {{n.y, n.dy}, {n.sum, n.dresidual}},
                       {{n.x, n.dresidual}, {n.weight, n.dweight}}));
}

TEST_CASE("rms norm: strided rows, no delta, sum in place of x, accumulation", "[op]") {
  OpCase c(12);
  const Slot x = c.normal({6, 20}), weight = c.normal({8}, 0.1, 1), y = c.output({6, 8});
  const Slot wide = c.values({6, 30}, std::vector<double>(180, 5));
  const Slot rstd = c.stat(c.output({6})), rstd2 = c.stat(c.output({6}));
  const Slot delta = c.normal({6, 20}), w20 = c.normal({20}), sum = c.output({6, 20});
  const Slot y1 = c.output({6, 20}), y2 = c.output({6, 20}), y3 = c.output({6, 20});
  const Slot dx = c.output({6, 20}), dwide = c.values({6, 30}, std::vector<double>(180, 5));
  const Slot once = c.stat(c.output({20})), twice = c.stat(c.output({20}));
  const Slot narrow = c.stat(c.output({8}));
  const auto body = [&](Ops& ops, Stream& s, const Bound& t) {
    const Tensor part = t[x].columns(5, 13);
    ops.add_rms_norm(s, part, Tensor(), t[weight], kEps, Tensor(), t[y], t[rstd]);
    ops.add_rms_norm(s, part, Tensor(), t[weight], kEps, Tensor(), t[wide].columns(2, 10), t[rstd]);
    ops.rms_norm_backward(s, t[delta].columns(3, 11), part, t[weight], t[rstd], Tensor(),
                          Accumulate::overwrite, t[dwide].columns(4, 12), t[narrow]);
    ops.add_rms_norm(s, t[x], t[delta], t[w20], kEps, t[sum], t[y1], t[rstd]);
    ops.add_rms_norm(s, t[x], t[delta], t[w20], kEps, t[x], t[y2], t[rstd2]);
    ops.add_rms_norm(s, t[x], Tensor(), t[w20], kEps, Tensor(), t[y3], t[rstd2]);
    ops.rms_norm_backward(s, t[delta], t[x], t[w20], t[rstd2], Tensor(), Accumulate::overwrite,
                          t[dx], t[once]);
    ops.rms_norm_backward(s, t[delta], t[x], t[w20], t[rstd2], Tensor(), Accumulate::overwrite,
                          t[dx], t[twice]);
    ops.rms_norm_backward(s, t[delta], t[x], t[w20], t[rstd2], Tensor(), Accumulate::add, t[dx],
                          t[twice]);
  };
  const Tolerance out{.sum_length = 20, .roundings = 3, .bf16_roundings = 1};
  const Tolerance gradient{.sum_length = 24, .roundings = 6};
  const Bound b = check_op(c, body,
                           {{y, out},
                            {wide, out},
                            {sum, {}},
                            {x, {}},
                            {y1, out},
                            {y2, out},
                            {y3, {.sum_length = 20, .roundings = 3}},
                            {dwide, gradient},
                            {narrow, gradient},
                            {dx, gradient},
                            {once, gradient},
                            {twice, gradient}});
  for (int64_t r = 0; r < 6; ++r) {
    for (int64_t d = 0; d < 8; ++d) {
      CHECK(b.at(y).get(8 * r + d) == b.at(wide).get(30 * r + 2 + d));
    }
    CHECK((b.at(wide).get(30 * r + 1) == 5 && b.at(wide).get(30 * r + 10) == 5));
    CHECK((b.at(dwide).get(30 * r + 3) == 5 && b.at(dwide).get(30 * r + 12) == 5));
  }
  CHECK(b.at(y1).same_bits(b.at(y2)));
  CHECK(b.at(sum).same_bits(b.at(x)));
  for (int64_t d = 0; d < 20; ++d) CHECK(b.at(twice).get(d) == 2 * b.at(once).get(d));
}

TEST_CASE("rms norm: all operands are columns of wider matrices, outputs in place", "[op]") {
  const auto [begin, D] = GENERATE(table<int64_t, int64_t>({{16, 64}, {5, 67}, {64, 32}}));
  CAPTURE(begin, D);
  const int64_t T = 21, wide = 96, end = begin + D;
  OpCase c(14);
  const Slot x = c.normal({T, wide}), delta = c.normal({T, wide}), dy = c.normal({T, wide});
  const Slot weight = c.normal({D}, 0.2, 1), y = c.normal({T, wide}), dx = c.normal({T, wide});
  const Slot rstd = c.stat(c.output({T})), dweight = c.stat(c.normal({D}));
  const Tolerance gradient{.sum_length = T + D, .roundings = 6};
  check_op(c,
           [&](Ops& ops, Stream& s, const Bound& t) {
             const Tensor sum = t[x].columns(begin, end), out = t[y].columns(begin, end);
             const Tensor dsum = t[dx].columns(begin, end);
             ops.add_rms_norm(s, sum, t[delta].columns(begin, end), t[weight], kEps, sum, out,
                              t[rstd]);
             ops.add_rms_norm(s, sum, Tensor(), t[weight], kEps, sum, out, t[rstd]);
             ops.rms_norm_backward(s, t[dy].columns(begin, end), sum, t[weight], t[rstd], dsum,
                                   Accumulate::add, dsum, t[dweight]);
           },
           {{x, {}},
            {y, {.sum_length = D, .roundings = 3}},
            {rstd, {.sum_length = D, .roundings = 1}},
            {dx, gradient},
            {dweight, gradient}});
}

TEST_CASE("rms norm: without delta the sum is a copy of x", "[op]") {
  const NormCase n(70, 33);
  const Bound b = run_op(n.c, DType::f32, 2, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.add_rms_norm(s, t[n.x], Tensor(), t[n.weight], kEps, t[n.sum], t[n.y], t[n.rstd]);
  });
  CHECK(b.at(n.sum).same_bits(b.at(n.x)));
}

TEST_CASE("rms norm: arguments that do not fit are named", "[ops]") {
  OpCase c(13);
  const Slot x = c.normal({2, 4}), weight = c.normal({3}), y = c.output({2, 4}), r = c.output({2});
  CHECK_THROWS_WITH(run_op(c, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& b) {
                             ops.add_rms_norm(s, b[x], Tensor(), b[weight], kEps, Tensor(), b[y],
                                              b[r]);
                           }),
                    Catch::Contains("add_rms_norm: weight_D is f32[3] where f32[4] belongs"));
}

}  // namespace dstrain::test
