// T tokens, H query heads, G key/value heads, Q width of a query/key head, W of a value head.
#include <cmath>

#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

struct Table {
  Slot cos, sin;
  bool interleaved;
  RopeTable of(const Bound& b) const { return {b[cos], b[sin], interleaved}; }
};

Table make_table(OpCase& c, int64_t positions, int64_t rope_dim, bool interleaved) {
  std::vector<double> cos, sin;
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t i = 0; i < rope_dim / 2; ++i) {
      const double angle =
          static_cast<double>(p) *
          std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(rope_dim));
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return {c.stat(c.values({positions, rope_dim / 2}, cos)),
          c.stat(c.values({positions, rope_dim / 2}, sin)), interleaved};
}

struct MlaCase {
  OpCase c{21};
  int64_t T, H, Q, P, W;
  Table table;
  Slot positions, q, k_rope, kv_b, k, v, dq, dk, dv, dk_rope, dkv_b;

  MlaCase(int64_t t, int64_t h, int64_t q_width, int64_t p, int64_t w, bool interleaved)
      : T(t), H(h), Q(q_width), P(p), W(w), table(make_table(c, 40, p, interleaved)) {
    positions = c.integers({T}, 0, 40);
    q = c.normal({T, H, Q});
    k_rope = c.normal({T, P});
    kv_b = c.normal({T, H, Q - P + W});
    k = c.output({T, H, Q});
    v = c.output({T, H, W});
    dq = c.normal({T, H, Q});
    dk = c.normal({T, H, Q});
    dv = c.normal({T, H, W});
    dk_rope = c.output({T, P});
    dkv_b = c.output({T, H, Q - P + W});
  }
  void forward(Ops& ops, Stream& s, const Bound& b) const {
    ops.mla_qkv(s, b[q], b[k_rope], b[kv_b], table.of(b), b[positions], b[k], b[v]);
  }
  void backward(Ops& ops, Stream& s, const Bound& b) const {
    ops.mla_qkv_backward(s, b[dq], b[dk], b[dv], table.of(b), b[positions], b[dk_rope], b[dkv_b]);
  }
};

struct GqaCase {
  OpCase c{22};
  int64_t T, H, G, Q;
  Table table;
  Slot positions, qkv, q, k, v, dq, dk, dv, dqkv;

  GqaCase(int64_t t, int64_t h, int64_t g, int64_t q_width, bool interleaved)
      : T(t), H(h), G(g), Q(q_width), table(make_table(c, 40, q_width, interleaved)) {
    positions = c.integers({T}, 0, 40);
    qkv = c.normal({T, (H + 2 * G) * Q});
    q = c.output({T, H, Q});
    k = c.output({T, G, Q});
    v = c.output({T, G, Q});
    dq = c.normal({T, H, Q});
    dk = c.normal({T, G, Q});
    dv = c.normal({T, G, Q});
    dqkv = c.output({T, (H + 2 * G) * Q});
  }
  void forward(Ops& ops, Stream& s, const Bound& b) const {
    ops.gqa_qkv(s, b[qkv], table.of(b), b[positions], b[q], b[k], b[v]);
  }
  void backward(Ops& ops, Stream& s, const Bound& b) const {
    ops.gqa_qkv_backward(s, b[dq], b[dk], b[dv], table.of(b), b[positions], b[dqkv]);
  }
};

}  // namespace

TEST_CASE("mla_qkv: f32 agrees with f64 and threads do not matter", "[op]") {
  const auto [T, H, Q, P, W] =
      GENERATE(table<int64_t, int64_t, int64_t, int64_t, int64_t>({{0, 2, 6, 4, 3},
                                                                   {1, 1, 2, 2, 1},
                                                                   {3, 5, 7, 4, 9},
                                                                   {300, 4, 48, 16, 32},
                                                                   {5, 2, 8, 8, 4},
                                                                   {3, 16, 192, 64, 128},
                                                                   {2, 33, 80, 64, 16}}));
  const bool interleaved = GENERATE(true, false);
  CAPTURE(T, H, Q, P, W, interleaved);
  const MlaCase m(T, H, Q, P, W, interleaved);
  check_op(m.c,
           [&](Ops& ops, Stream& s, const Bound& b) {
             m.forward(ops, s, b);
             m.backward(ops, s, b);
           },
           {{m.q, {.sum_length = 2, .roundings = 1}},
            {m.k, {.sum_length = 2, .roundings = 1}},
            {m.v, {}},
            {m.dq, {.sum_length = 2, .roundings = 1}},
            {m.dk_rope, {.sum_length = 2 * H, .roundings = 1}},
            {m.dkv_b, {}}});
}

TEST_CASE("mla_qkv: layout and rotation", "[ops]") {
  const bool interleaved = GENERATE(true, false);
  const MlaCase m(7, 3, 10, 4, 5, interleaved);
  const Bound before = m.c.bind(DType::f64);
  const Bound b = run_op(m.c, DType::f64, 1, [&](Ops& ops, Stream& s, const Bound& bound) {
    m.forward(ops, s, bound);
  });
  for (int64_t t = 0; t < m.T; ++t) {
    const auto position = static_cast<int64_t>(b.at(m.positions).get(t));
    const auto rotated = [&](const HostTensor& x, int64_t at, int64_t i) {
      const int64_t pair = interleaved ? i / 2 : i % 2;
      const bool second = interleaved ? i % 2 == 1 : i >= 2;
      const double a = x.get(at + (interleaved ? 2 * pair : pair));
      const double d = x.get(at + (interleaved ? 2 * pair + 1 : pair + 2));
      const double cos = b.at(m.table.cos).get(2 * position + pair);
      const double sin = b.at(m.table.sin).get(2 * position + pair);
      return second ? a * sin + d * cos : a * cos - d * sin;
    };
    for (int64_t h = 0; h < 3; ++h) {
      const int64_t head = (t * 3 + h) * 10, kv = (t * 3 + h) * 11;
      for (int64_t i = 0; i < 6; ++i) {
        CHECK(b.at(m.q).get(head + i) == before.at(m.q).get(head + i));
        CHECK(b.at(m.k).get(head + i) == before.at(m.kv_b).get(kv + i));
      }
      for (int64_t i = 0; i < 4; ++i) {
        CHECK(b.at(m.q).get(head + 6 + i) == Approx(rotated(before.at(m.q), head + 6, i)));
        CHECK(b.at(m.k).get(head + 6 + i) == Approx(rotated(before.at(m.k_rope), 4 * t, i)));
      }
      for (int64_t i = 0; i < 5; ++i) {
        CHECK(b.at(m.v).get((t * 3 + h) * 5 + i) == before.at(m.kv_b).get(kv + 6 + i));
      }
    }
  }
}

TEST_CASE("mla_qkv: gradients, and a fault turns the check red", "[ops]") {
  const bool interleaved = GENERATE(true, false);
  const MlaCase m(4, 3, 7, 4, 5, interleaved);
  const auto check = [&](const OpBody& backward) {
    return check_gradient(m.c, [&](Ops& ops, Stream& s, const Bound& b) { m.forward(ops, s, b); },
                          backward, {{m.q, m.dq}, {m.k, m.dk}, {m.v, m.dv}},
                          {{m.q, m.dq}, {m.k_rope, m.dk_rope}, {m.kv_b, m.dkv_b}});
  };
  CHECK(check([&](Ops& ops, Stream& s, const Bound& b) { m.backward(ops, s, b); }));
  CHECK_FALSE(check([&](Ops& ops, Stream& s, const Bound& b) {
    m.backward(ops, s, b);
    m.backward(ops, s, b);  // turns dq back twice
  }));
}

TEST_CASE("mla_qkv: k_rope and dk_rope are columns of wider matrices", "[op]") {
  const auto [Q, P, W, begin] =
      GENERATE(table<int64_t, int64_t, int64_t, int64_t>({{6, 4, 3, 7}, {24, 8, 16, 16}}));
  const bool interleaved = GENERATE(true, false);
  CAPTURE(Q, P, W, begin, interleaved);
  const MlaCase m(9, 2, Q, P, W, interleaved);
  OpCase c = m.c;
  const int64_t end = begin + P;
  const Slot wide = c.normal({9, end});
  const Slot dwide = c.values({9, end}, std::vector<double>(static_cast<size_t>(9 * end), 5));
  const auto body = [&](Ops& ops, Stream& s, const Bound& t) {
    const Tensor columns = t[wide].columns(begin, end), dcolumns = t[dwide].columns(begin, end);
    ops.convert(s, t[m.k_rope], columns);
    m.backward(ops, s, t);
    ops.mla_qkv(s, t[m.dq], columns, t[m.kv_b], m.table.of(t), t[m.positions], t[m.k], t[m.v]);
    m.forward(ops, s, t);
    ops.mla_qkv_backward(s, t[m.q], t[m.dk], t[m.dv], m.table.of(t), t[m.positions], dcolumns,
                         t[m.dkv_b]);
  };
  const Bound b = check_op(c, body,
                           {{m.k, {.sum_length = 2, .roundings = 1}},
                            {dwide, {.sum_length = 4, .roundings = 1}},
                            {m.dq, {.sum_length = 4, .roundings = 2}}});
  const Bound plain = run_op(m.c, DType::f64, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    m.forward(ops, s, t);
    m.backward(ops, s, t);
  });
  CHECK(b.at(m.k).same_bits(plain.at(m.k)));
  for (int64_t i = 0; i < 9; ++i) {
    CHECK(b.at(dwide).get(i * end + begin - 1) == 5);
    for (int64_t p = 0; p < P; ++p) {
      CHECK(b.at(dwide).get(i * end + begin + p) == plain.at(m.dk_rope).get(i * P + p));
    }
  }
}

TEST_CASE("mla_qkv: without queries, keys and values are the same", "[op]") {
  const MlaCase m(5, 3, 24, 8, 16, true);
  const Tolerance turned{.sum_length = 2, .roundings = 1};
  const Bound b = check_op(m.c,
                           [&](Ops& ops, Stream& s, const Bound& t) {
                             ops.mla_qkv(s, Tensor(), t[m.k_rope], t[m.kv_b], m.table.of(t),
                                         t[m.positions], t[m.k], t[m.v]);
                           },
                           {{m.k, turned}, {m.v, {}}});
  const Bound with = run_op(m.c, DType::f64, 1,
                            [&](Ops& ops, Stream& s, const Bound& t) { m.forward(ops, s, t); });
  CHECK(b.at(m.k).same_bits(with.at(m.k)));
  CHECK(b.at(m.v).same_bits(with.at(m.v)));
}

TEST_CASE("mla_qkv_backward: without queries, gradients of keys and values are the same", "[op]") {
  const MlaCase m(37, 3, 24, 8, 16, GENERATE(false, true));
  const Tolerance sum{.sum_length = 6, .roundings = 2};
  const Bound b = check_op(m.c,
                           [&](Ops& ops, Stream& s, const Bound& t) {
                             ops.mla_qkv_backward(s, Tensor(), t[m.dk], t[m.dv], m.table.of(t),
                                                  t[m.positions], t[m.dk_rope], t[m.dkv_b]);
                           },
                           {{m.dk_rope, sum}, {m.dkv_b, {}}});
  const Bound with = run_op(m.c, DType::f64, 1,
                            [&](Ops& ops, Stream& s, const Bound& t) { m.backward(ops, s, t); });
  CHECK(b.at(m.dk_rope).same_bits(with.at(m.dk_rope)));
  CHECK(b.at(m.dkv_b).same_bits(with.at(m.dkv_b)));
}

TEST_CASE("gqa_qkv: f32 agrees with f64 and threads do not matter", "[op]") {
  const auto [T, H, G, Q] = GENERATE(table<int64_t, int64_t, int64_t, int64_t>({{0, 2, 1, 4},
                                                                                {1, 1, 1, 2},
                                                                                {3, 6, 3, 10},
                                                                                {200, 8, 2, 64},
                                                                                {3, 12, 2, 128},
                                                                                {5, 5, 1, 600}}));
  const bool interleaved = GENERATE(true, false);
  CAPTURE(T, H, G, Q, interleaved);
  const GqaCase g(T, H, G, Q, interleaved);
  check_op(g.c,
           [&](Ops& ops, Stream& s, const Bound& b) {
             g.forward(ops, s, b);
             g.backward(ops, s, b);
           },
           {{g.q, {.sum_length = 2, .roundings = 1}},
            {g.k, {.sum_length = 2, .roundings = 1}},
            {g.v, {}},
            {g.dqkv, {.sum_length = 2, .roundings = 1}}});
}

TEST_CASE("gqa_qkv: gradients, and a fault turns the check red", "[ops]") {
  const bool interleaved = GENERATE(true, false);
  const GqaCase g(3, 4, 2, 6, interleaved);
  const auto check = [&](const OpBody& backward) {
    return check_gradient(g.c, [&](Ops& ops, Stream& s, const Bound& b) { g.forward(ops, s, b); },
                          backward, {{g.q, g.dq}, {g.k, g.dk}, {g.v, g.dv}}, {{g.qkv, g.dqkv}});
  };
  CHECK(check([&](Ops& ops, Stream& s, const Bound& b) { g.backward(ops, s, b); }));
  CHECK_FALSE(check([&](Ops& ops, Stream& s, const Bound& b) {
    const RopeTable wrong{b[g.table.cos], b[g.table.sin], !interleaved};
    ops.gqa_qkv_backward(s, b[g.dq], b[g.dk], b[g.dv], wrong, b[g.positions], b[g.dqkv]);
  }));
}

TEST_CASE("gqa_qkv: groups are query heads, key, value", "[op]") {
  // At position 0 nothing turns, so the op is a permutation of heads.
  const int64_t H = 4, G = 2, Q = 2;
  OpCase c(23);
  const Table table = make_table(c, 1, Q, false);
  std::vector<double> numbers;
  for (int i = 0; i < (H + 2 * G) * Q; ++i) numbers.push_back(i);
  const Slot positions = c.fixed(DType::i32, {1}, {0}), qkv = c.values({1, 16}, numbers);
  const Slot q = c.output({1, H, Q}), k = c.output({1, G, Q}), v = c.output({1, G, Q});
  const Bound b = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& t) {
    ops.gqa_qkv(s, t[qkv], table.of(t), t[positions], t[q], t[k], t[v]);
  });
  CHECK(b.at(q).values() == std::vector<double>{0, 1, 2, 3, 8, 9, 10, 11});
  CHECK(b.at(k).values() == std::vector<double>{4, 5, 12, 13});
  CHECK(b.at(v).values() == std::vector<double>{6, 7, 14, 15});
}

TEST_CASE("rope: a position outside of the table is refused", "[ops]") {
  const int64_t position = GENERATE(-1, 40);
  GqaCase g(1, 1, 1, 2, true);
  g.positions = g.c.fixed(DType::i32, {1}, {static_cast<double>(position)});
  CHECK_THROWS_WITH(run_op(g.c, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& b) { g.forward(ops, s, b); }),
                    Catch::Contains("is outside of the rotary table"));
}

}  // namespace dstrain::test
