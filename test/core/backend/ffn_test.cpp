// ffn_up and ffn_down_backward_input against the formula in double, f64, threads and differences.
#include <cmath>
#include <vector>

#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

struct Case {
  int64_t E, D, I, X;
  std::vector<double> offsets;  // empty: absent
  bool indexed, weighted;
};

std::vector<double> index_of(const Case& k, int64_t R) {
  std::vector<double> index;
  for (int64_t r = 0; r < R; ++r) index.push_back(static_cast<double>((r * 5 + 2) % k.X));
  return index;
}

// The tensors of the feed-forward y = h W_down^T with h from ffn_up.
struct Ffn {
  OpCase c;
  int64_t R;
  Slot x, w_up, w_down, offsets, index, row_weight, gate_up, h, y;
  Slot dy, dgate_up, h_again, drow_weight, dx, dw_up, dw_down;

  Ffn(uint64_t seed, const Case& k)
      : c(seed), R(k.offsets.empty() ? k.X : static_cast<int64_t>(k.offsets.back())) {
    x = c.normal({k.indexed ? k.X : R, k.D});
    w_up = c.normal({k.E, 2 * k.I, k.D}, 0.5);
    w_down = c.normal({k.E, k.D, k.I}, 0.5);
    if (!k.offsets.empty()) offsets = c.fixed(DType::i32, {k.E + 1}, k.offsets);
    if (k.indexed) index = c.fixed(DType::i32, {R}, index_of(k, R));
    if (k.weighted) {
      row_weight = c.stat(c.uniform({R}, 0.1, 1));
      drow_weight = c.stat(c.output({R}));
    }
    gate_up = c.output({R, 2 * k.I});
    h = c.output({R, k.I});
    y = c.output({R, k.D});
    dy = c.normal({R, k.D});
    dgate_up = c.output({R, 2 * k.I});
    h_again = c.output({R, k.I});
    dx = c.output({R, k.D});
    dw_up = c.stat(c.output({k.E, 2 * k.I, k.D}));
    dw_down = c.stat(c.output({k.E, k.D, k.I}));
  }

  OpBody forward() const {
    return [f = *this](Ops& ops, Stream& s, const Bound& t) {
      ops.ffn_up(s, t[f.x], t[f.index], t[f.w_up], t[f.offsets], t[f.row_weight], t[f.gate_up],
                 t[f.h]);
      ops.grouped_matmul(s, t[f.h], {}, t[f.w_down], t[f.offsets], t[f.y]);
    };
  }
  OpBody backward() const {
    return [f = *this](Ops& ops, Stream& s, const Bound& t) {
      ops.ffn_down_backward_input(s, t[f.dy], {}, t[f.w_down], t[f.offsets], t[f.gate_up],
                                  t[f.row_weight], t[f.dgate_up], t[f.h_again], t[f.drow_weight]);
      ops.grouped_matmul_backward_input(s, t[f.dgate_up], {}, t[f.w_up], t[f.offsets], t[f.dx]);
      ops.grouped_matmul_backward_weight(s, t[f.dgate_up], {}, t[f.x], t[f.index], t[f.offsets],
                                         Accumulate::overwrite, t[f.dw_up]);
      ops.grouped_matmul_backward_weight(s, t[f.dy], {}, t[f.h_again], {}, t[f.offsets],
                                         Accumulate::overwrite, t[f.dw_down]);
    };
  }
};

int64_t group_of(const Case& k, int64_t r) {
  int64_t e = 0;
  while (!k.offsets.empty() && static_cast<double>(r) >= k.offsets[static_cast<size_t>(e + 1)]) ++e;
  return e;
}

double sigmoid_of(double x) {
  return 1 / (1 + std::exp(-x));
}

Case make_case(int which) {
  switch (which) {
    case 0:
      return {1, 5, 3, 7, {}, false, false};
    case 1:
      return {3, 8, 6, 4, {0, 4, 4, 9}, true, true};
    case 2:
      return {1, 1, 1, 1, {0, 1}, false, true};
    case 3:
      return {4, 40, 528, 200, {0, 150, 151, 151, 400}, true, true};  // columns are cut
    case 4:
      return {2, 4, 4, 3, {0, 0, 0}, true, true};
    case 5:  // no dim is a multiple of a tile, and a group ends behind one
      return {3, 136, 264, 90, {0, 130, 130, 260}, true, true};
    default:
      return {1, 72, 136, 140, {}, false, false};
  }
}

// In bf16 an op may compute h from gate and up before or after they are stored, that is rounded,
// and round the gradient of h, too.
TEST_CASE("ffn_up: gate and up products, then silu(gate) up weight", "[core][op]") {
  const Case k = make_case(GENERATE(0, 1, 2, 3, 5, 6));
  const bool realistic = k.I > 100;
  const Ffn f(41, k);
  const Bound t = check_op(f.c, f.forward(),
                           {{f.gate_up, {.sum_length = k.D}},
                            {f.h, {.sum_length = k.D, .roundings = 8, .bf16_roundings = 2}},
                            {f.y, {.sum_length = k.D + k.I, .roundings = 8, .bf16_roundings = 3}}});
  const auto source = [&](int64_t r) {
    return k.indexed ? static_cast<int64_t>(index_of(k, f.R)[static_cast<size_t>(r)]) : r;
  };
  HostTensor want(DType::f64, {f.R, k.I});
  for (int64_t r = 0; r < f.R; r += realistic ? 37 : 1) {
    const int64_t e = group_of(k, r);
    const auto dot = [&](int64_t column) {
      double sum = 0;
      for (int64_t d = 0; d < k.D; ++d)
        sum +=
            t.at(f.x).get(source(r) * k.D + d) * t.at(f.w_up).get((e * 2 * k.I + column) * k.D + d);
      return sum;
    };
    const double w = k.weighted ? t.at(f.row_weight).get(r) : 1;
    for (int64_t i = 0; i < k.I; ++i) {
      const double gate = dot(i), up = dot(k.I + i);
      REQUIRE(t.at(f.gate_up).get(r * 2 * k.I + i) ==
              Catch::Approx(gate).epsilon(1e-12).margin(1e-12));
      REQUIRE(t.at(f.gate_up).get(r * 2 * k.I + k.I + i) ==
              Catch::Approx(up).epsilon(1e-12).margin(1e-12));
      REQUIRE(t.at(f.h).get(r * k.I + i) ==
              Catch::Approx(gate * sigmoid_of(gate) * up * w).epsilon(1e-12).margin(1e-12));
    }
  }
}

TEST_CASE("ffn_down_backward_input: f32 against f64, threads, h as in the forward pass",
          "[core][op]") {
  const Case k = make_case(GENERATE(0, 1, 2, 3, 5, 6));
  const Ffn f(42, k);
  const auto both = [f](Ops& ops, Stream& s, const Bound& t) {
    f.forward()(ops, s, t);
    f.backward()(ops, s, t);
  };
  std::vector<Expectation> expectations = {
      {f.dgate_up, {.sum_length = 2 * k.D, .roundings = 12, .bf16_roundings = 2}},
      {f.h_again, {.sum_length = k.D, .roundings = 8, .bf16_roundings = 2}},
      {f.dx, {.sum_length = 2 * (k.D + k.I), .roundings = 12, .bf16_roundings = 3}},
      {f.dw_up, {.sum_length = 2 * k.D + f.R, .roundings = 12, .bf16_roundings = 3}},
      {f.dw_down, {.sum_length = k.D + f.R, .roundings = 12, .bf16_roundings = 3}}};
  if (k.weighted)
    expectations.push_back(
        {f.drow_weight, {.sum_length = 2 * k.D + k.I, .roundings = 12, .bf16_roundings = 3}});
  const Bound t = check_op(f.c, both, expectations);
  CHECK(compare_within(t.at(f.h_again), t.at(f.h), 1e-14));

  for (int64_t r = 0; k.weighted && r<f.R; r += k.I> 100 ? 37 : 1) {
    double want = 0;
    for (int64_t i = 0; i < k.I; ++i) {
      double dh = 0;
      for (int64_t d = 0; d < k.D; ++d) {
        dh +=
            t.at(f.dy).get(r * k.D + d) * t.at(f.w_down).get((group_of(k, r) * k.D + d) * k.I + i);
      }
      want += dh * t.at(f.h).get(r * k.I + i) / t.at(f.row_weight).get(r);
    }
    REQUIRE(t.at(f.drow_weight).get(r) == Catch::Approx(want).epsilon(1e-11).margin(1e-11));
  }
}

TEST_CASE("feed-forward gradients agree with differences", "[core][ops]") {
  const bool grouped = GENERATE(false, true);
  const Ffn f(43, grouped ? Case{3, 5, 4, 9, {0, 4, 4, 9}, false, true} : make_case(0));
  std::vector<GradientPair> inputs = {{f.x, f.dx}, {f.w_up, f.dw_up}, {f.w_down, f.dw_down}};
  if (grouped) inputs.push_back({f.row_weight, f.drow_weight});
  CHECK(check_gradient(f.c, f.forward(), f.backward(), {{f.y, f.dy}}, inputs));

  const auto planted_fault = [f](Ops& ops, Stream& s, const Bound& t) {
    f.backward()(ops, s, t);
    t[f.dw_up].data<double>()[1] += 1e-4;
  };
  CHECK_FALSE(check_gradient(f.c, f.forward(), planted_fault, {{f.y, f.dy}}, inputs));
}

TEST_CASE("feed-forward: groups without rows and no rows at all", "[core][op]") {
  const Ffn f(44, make_case(4));
  const Bound t = run_op(f.c, DType::f32, 2, [&](Ops& ops, Stream& s, const Bound& b) {
    f.forward()(ops, s, b);
    f.backward()(ops, s, b);
  });
  for (const double value : t.at(f.dw_up).values()) CHECK(value == 0);
}

TEST_CASE("ffn_up: very large gates stay finite", "[core][op]") {
  OpCase c(45);
  const Slot x = c.values({1, 1}, {1}), w = c.values({1, 4, 1}, {-1e4, 1e4, 1, 1});
  const Slot gate_up = c.output({1, 4}), h = c.output({1, 2});
  const Bound t = run_op(c, DType::f32, 1, [=](Ops& ops, Stream& s, const Bound& b) {
    ops.ffn_up(s, b[x], {}, b[w], {}, {}, b[gate_up], b[h]);
  });
  CHECK(t.at(h).get(0) == 0);
  CHECK(t.at(h).get(1) == Catch::Approx(1e4).epsilon(1e-6));
}

}  // namespace
}  // namespace dstrain::test
