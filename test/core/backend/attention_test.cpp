// attention and attention_backward against the plain softmax in double, f64, threads and
// differences.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

struct Shape {
  int64_t T, U, H, G, Q, W;
  std::vector<double> table;  // {query begin, query count, key begin, key count} per segment
  bool uniform = false;
  bool causal = true;
};

struct Attention {
  Shape k;
  OpCase c;
  double scale;
  Slot q, key, v, table, count, o, lse, dout, dq, dk, dv;

  Attention(uint64_t seed, Shape shape, int64_t unused_rows = 1)
      : k(std::move(shape)), c(seed), scale(1 / std::sqrt(static_cast<double>(k.Q))) {
    const int64_t N = static_cast<int64_t>(k.table.size()) / 4;
    std::vector<double> rows = k.table;
    rows.resize(static_cast<size_t>(4 * (N + unused_rows)),
                -1000);  // rows after count are not read
    q = c.normal({k.T, k.H, k.Q});
    key = c.normal({k.U, k.G, k.Q});
    v = c.normal({k.U, k.G, k.W});
    table = c.fixed(DType::i32, {N + unused_rows, 4}, rows);
    count = c.fixed(DType::i32, {1}, {static_cast<double>(N)});
    o = c.output({k.T, k.H, k.W});
    lse = c.stat(c.output({k.T, k.H}));
    dout = c.normal({k.T, k.H, k.W});
    dq = c.output({k.T, k.H, k.Q});
    dk = c.output({k.U, k.G, k.Q});
    dv = c.output({k.U, k.G, k.W});
  }
  AttentionSegments segments(const Bound& t) const {
    const int64_t N = t[table].size(0);
    if (!k.causal) return {t[table], t[count], k.T, k.U, N, false, false};
    if (!k.uniform) return {t[table], t[count], k.T, k.U};
    return {t[table], t[count], k.T / N, k.U / N, N, true};
  }
  OpBody forward() const {
    return [a = *this](Ops& ops, Stream& s, const Bound& t) {
      ops.attention(s, t[a.q], t[a.key], t[a.v], a.segments(t), a.scale, t[a.o], t[a.lse]);
    };
  }
  OpBody backward() const {
    return [a = *this](Ops& ops, Stream& s, const Bound& t) {
      ops.attention_backward(s, t[a.dout], t[a.q], t[a.key], t[a.v], t[a.o], t[a.lse],
                             a.segments(t), a.scale, t[a.dq], t[a.dk], t[a.dv]);
    };
  }
  OpBody both() const {
    return [f = forward(), b = backward()](Ops& ops, Stream& s, const Bound& t) {
      f(ops, s, t);
      b(ops, s, t);
    };
  }
};

Shape small(int which) {
  switch (which) {
    case 0:
      return {5, 5, 2, 2, 3, 4, {0, 5, 0, 5}};
    case 1:
      return {6, 6, 4, 2, 3, 2, {0, 2, 0, 2, 2, 1, 2, 1, 3, 3, 3, 3}};  // packed documents
    case 2:
      return {4, 9, 2, 1, 3, 3, {0, 2, 0, 5, 2, 2, 0, 9}};  // shared keys: context parallel
    case 3:
      return {5, 8, 2, 2, 2, 3, {2, 3, 4, 4, 0, 2, 0, 3}};  // not in order, keys 3 unused
    default:
      return {1, 1, 1, 1, 1, 1, {0, 1, 0, 1}};
  }
}

// Several tiles of queries and keys.
Shape large(int which) {
  switch (which) {
    case 0:
      return {700, 700, 2, 1, 12, 8, {0, 700, 0, 700}};  // one head: dk and dv by keys
    case 1:
      return {130, 1300, 2, 2, 8, 4, {0, 65, 0, 1150, 65, 65, 0, 1300}};
    case 2:
      return {330, 330, 8, 8, 4, 4, {0, 130, 0, 130, 130, 1, 130, 1, 131, 199, 131, 199}};
    default:
      return {90, 600, 16, 8, 4, 4, {0, 70, 0, 600, 70, 20, 100, 490}};  // eight heads share keys
  }
}

// Widths that matrix units take, and wider heads than most models have. Where the key rows are the
// query rows, a GPU may compute all documents in one call of a library.
Shape wide(int which) {
  switch (which) {
    case 0:  // MLA
      return {150, 150, 2, 2, 192, 128, {0, 150, 0, 150}};
    case 1:  // documents with rows in none before, between and after them
      return {141, 141, 4, 2, 24, 16, {3, 40, 3, 40, 43, 1, 43, 1, 50, 80, 50, 80}};
    case 2:  // a batch
      return {111, 111, 4, 2, 16, 24, {0, 37, 0, 37, 37, 37, 37, 37, 74, 37, 74, 37}, true};
    case 3:  // a batch of the last tokens of longer sequences
      return {40, 160, 4, 2, 64, 64, {0, 20, 0, 80, 20, 20, 80, 80}, true};
    case 4:  // context parallel
      return {70, 130, 2, 1, 200, 136, {0, 30, 0, 90, 30, 40, 0, 130}};
    default: {  // many short documents
      Shape shape{450, 450, 2, 1, 8, 16, {}};
      for (double row = 0; row < 450; row += 3)
        shape.table.insert(shape.table.end(), {row, 1, row, 1, row + 1, 2, row + 1, 2});
      return shape;
    }
  }
}

// Keys of other ranks, of which each query of a segment sees all.
Shape of_others(int which) {
  switch (which) {
    case 0:
      return {5, 4, 2, 1, 3, 2, {1, 3, 0, 4}, false, false};  // rows without keys on both sides
    case 1:
      return {7, 9, 4, 2, 3, 4, {0, 4, 1, 2, 5, 1, 4, 5}, false, false};  // more and fewer keys
    case 2:
      return {330, 410, 8, 4, 16, 8, {0, 130, 5, 300, 200, 130, 320, 80}, false, false};
    case 3:  // many keys of one head: dk and dv by keys
      return {150, 1100, 1, 1, 8, 8, {20, 110, 10, 1080}, false, false};
    case 4:  // MLA
      return {150, 130, 2, 2, 192, 128, {75, 75, 0, 130}, false, false};
    default:
      return {96, 96, 4, 2, 64, 64, {0, 24, 24, 24, 48, 24, 72, 24}, false, false};
  }
}

// The definition, one query and head at a time, in double.
struct Reference {
  HostTensor o, lse, dq, dk, dv;

  Reference(const Attention& a, const Bound& t)
      : o(DType::f64, {a.k.T, a.k.H, a.k.W}),
        lse(DType::f64, {a.k.T, a.k.H}),
        dq(DType::f64, {a.k.T, a.k.H, a.k.Q}),
        dk(DType::f64, {a.k.U, a.k.G, a.k.Q}),
        dv(DType::f64, {a.k.U, a.k.G, a.k.W}) {
    const auto entry = [&](size_t i) { return static_cast<int64_t>(a.k.table[i]); };
    for (size_t n = 0; n < a.k.table.size(); n += 4) {
      for (int64_t j = 0; j < entry(n + 1); ++j) {
        const int64_t visible = a.k.causal ? entry(n + 3) - entry(n + 1) + j + 1 : entry(n + 3);
        for (int64_t h = 0; h < a.k.H; ++h) query(a, t, entry(n) + j, h, entry(n + 2), visible);
      }
    }
  }

 private:
  static double dot(const HostTensor& x, int64_t i, const HostTensor& y, int64_t j, int64_t n) {
    double sum = 0;
    for (int64_t d = 0; d < n; ++d) sum += x.get(i * n + d) * y.get(j * n + d);
    return sum;
  }
  static void add(HostTensor& x, int64_t i, double factor, const HostTensor& y, int64_t j,
                  int64_t n) {
    for (int64_t d = 0; d < n; ++d) x.set(i * n + d, x.get(i * n + d) + factor * y.get(j * n + d));
  }

  void query(const Attention& a, const Bound& t, int64_t row, int64_t h, int64_t key,
             int64_t visible) {
    const int64_t Q = a.k.Q, W = a.k.W, i = row * a.k.H + h;
    const auto key_row = [&](int64_t u) { return (key + u) * a.k.G + h / (a.k.H / a.k.G); };
    std::vector<double> p;
    double largest = -1e300, sum = 0, delta = 0;
    for (int64_t u = 0; u < visible; ++u) {
      p.push_back(a.scale * dot(t.at(a.q), i, t.at(a.key), key_row(u), Q));
      largest = std::max(largest, p.back());
    }
    for (double& value : p) sum += value = std::exp(value - largest);
    for (double& value : p) value /= sum;
    lse.set(i, largest + std::log(sum));
    for (int64_t u = 0; u < visible; ++u) {
      const double weight = p[static_cast<size_t>(u)];
      add(o, i, weight, t.at(a.v), key_row(u), W);
      add(dv, key_row(u), weight, t.at(a.dout), i, W);
      delta += weight * dot(t.at(a.dout), i, t.at(a.v), key_row(u), W);
    }
    for (int64_t u = 0; u < visible; ++u) {
      const double dp = dot(t.at(a.dout), i, t.at(a.v), key_row(u), W);
      const double ds = p[static_cast<size_t>(u)] * (dp - delta) * a.scale;
      add(dq, i, ds, t.at(a.key), key_row(u), Q);
      add(dk, key_row(u), ds, t.at(a.q), i, Q);
    }
  }
};

void check_by_definition(const Attention& a, const Bound& t) {
  const Reference want(a, t);
  CHECK(compare_within(t.at(a.o), want.o, 1e-13));
  CHECK(compare_within(t.at(a.lse), want.lse, 1e-13));
  CHECK(compare_within(t.at(a.dq), want.dq, 1e-13));
  CHECK(compare_within(t.at(a.dk), want.dk, 1e-13));
  CHECK(compare_within(t.at(a.dv), want.dv, 1e-13));
}

// The terms of a softmax gradient cancel; the rule's limit is that of the terms before they do.
void check_attention(const Attention& a) {
  // In bf16 the probabilities are rounded before they multiply values, and their gradients, which
  // take up the error of the output, before they multiply queries and keys.
  const Tolerance plain{.sum_length = 2 * a.k.Q + a.k.W + a.k.U, .roundings = 12};
  Tolerance output = plain, gradient = plain;
  output.bf16_roundings = 1;
  gradient.bf16_roundings = 3;
  const Bound t = check_op(
      a.c, a.both(),
      {{a.o, output}, {a.lse, plain}, {a.dq, gradient}, {a.dk, gradient}, {a.dv, gradient}});
  check_by_definition(a, t);
}

TEST_CASE("attention and its gradients: the causal softmax of each segment", "[core][op]") {
  const int which = GENERATE(0, 1, 2, 3);
  CAPTURE(which);
  check_attention(Attention(51, small(which)));
}

TEST_CASE("attention and its gradients: segments of several tiles", "[core][op][long]") {
  const int which = GENERATE(0, 1, 2, 3);
  CAPTURE(which);
  check_attention(Attention(51, large(which)));
}

TEST_CASE("attention and its gradients: widths of heads that models have", "[core][op][cudnn]") {
  const int which = GENERATE(0, 1, 2, 3, 4, 5);
  CAPTURE(which);
  const Shape shape = wide(which);
  check_attention(Attention(54, shape, shape.uniform ? 0 : 1));
}

TEST_CASE("attention and its gradients: keys of which queries see all", "[core][op][cudnn]") {
  const int which = GENERATE(0, 1, 2, 3, 4, 5);
  CAPTURE(which);
  check_attention(Attention(55, of_others(which), which % 2));
}

// Queries see their own rows' keys, and of the rows of another rank what is in their document: one
// after the other, and merged.
struct Pieces {
  static constexpr int64_t kOther = 60, kOwn = 90;   // rows
  static constexpr int64_t kSeen = 37, kReach = 50;  // of the other's rows; by so many queries
  Attention whole;
  Slot own_table, other_table, own_count, other_count, part, part_lse, part_dq;

  Pieces(uint64_t seed, int64_t H, int64_t G, int64_t Q, int64_t W)
      : whole(seed, {kOwn,
                     kOther + kOwn,
                     H,
                     G,
                     Q,
                     W,
                     {0, kReach, kOther - kSeen, kSeen + kReach, kReach, kOwn - kReach,
                      kOther + kReach, kOwn - kReach}}) {
    OpCase& c = whole.c;
    own_table = c.fixed(DType::i32, {2, 4},
                        {0, kReach, 0, kReach, kReach, kOwn - kReach, kReach, kOwn - kReach});
    other_table = c.fixed(DType::i32, {1, 4}, {0, kReach, kOther - kSeen, kSeen});
    own_count = c.fixed(DType::i32, {1}, {2});
    other_count = c.fixed(DType::i32, {1}, {1});
    part = c.output({kOwn, H, W});
    part_lse = c.stat(c.output({kOwn, H}));
    part_dq = c.output({kOwn, H, Q});
  }
  OpBody body(bool merges = true) const {
    return [p = *this, merges](Ops& ops, Stream& s, const Bound& t) {
      const Attention& a = p.whole;
      const AttentionSegments own{t[p.own_table], t[p.own_count], kReach, kReach, 2};
      const AttentionSegments other{
          t[p.other_table], t[p.other_count], kReach, kSeen, 1, false, false};
      const auto rows = [&](Slot slot, bool of_other) {
        return of_other ? t[slot].rows(0, kOther) : t[slot].rows(kOther, kOther + kOwn);
      };
      ops.attention(s, t[a.q], rows(a.key, false), rows(a.v, false), own, a.scale, t[a.o],
                    t[a.lse]);
      ops.attention(s, t[a.q], rows(a.key, true), rows(a.v, true), other, a.scale, t[p.part],
                    t[p.part_lse]);
      if (merges) ops.merge_attention(s, t[p.part], t[p.part_lse], other, t[a.o], t[a.lse], t[a.o]);
      const auto backward = [&](const AttentionSegments& segments, bool of_other, Slot dq) {
        ops.attention_backward(s, t[a.dout], t[a.q], rows(a.key, of_other), rows(a.v, of_other),
                               t[a.o], t[a.lse], segments, a.scale, t[dq], rows(a.dk, of_other),
                               rows(a.dv, of_other));
      };
      backward(other, true, p.part_dq);
      backward(own, false, a.dq);
      ops.add(s, t[a.dq], t[p.part_dq], t[a.dq]);
    };
  }
};

TEST_CASE("attention by pieces of the keys is attention", "[core][op][cudnn]") {
  const bool mla = GENERATE(false, true);
  CAPTURE(mla);
  const Pieces p = mla ? Pieces(61, 2, 2, 192, 128) : Pieces(62, 4, 2, 64, 64);
  const Attention& a = p.whole;
  const Tolerance plain{.sum_length = 2 * a.k.Q + a.k.W + a.k.U, .roundings = 16};
  Tolerance output = plain, gradient = plain;
  output.bf16_roundings = 4;
  gradient.bf16_roundings = 5;
  const Bound t = check_op(
      a.c, p.body(),
      {{a.o, output}, {a.lse, plain}, {a.dq, gradient}, {a.dk, gradient}, {a.dv, gradient}});
  check_by_definition(a, t);
  const Reference want(a, t);
  const Bound unmerged = run_op(a.c, DType::f64, 1, p.body(false));
  CHECK_FALSE(compare_within(unmerged.at(a.o), want.o, 1e-3));
  CHECK_FALSE(compare_within(unmerged.at(a.dk), want.dk, 1e-3));
}

TEST_CASE("merge_attention: far apart, and rows of no segment", "[core][op]") {
  OpCase c(63);
  const Slot o = c.values({4, 1, 3}, {1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3}),
             part = c.values({4, 1, 3}, {5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5}),
             lse = c.stat(c.values({4, 1}, {1, 2000, 7, -2000})),
             part_lse = c.stat(c.values({4, 1}, {1, -2000, 9, 2000})),
             table = c.fixed(DType::i32, {2, 4}, {0, 2, 0, 1, 3, 1, 1, 1}),
             count = c.fixed(DType::i32, {1}, {2});
  const Bound t = run_op(c, DType::f32, 1, [&](Ops& ops, Stream& s, const Bound& b) {
    ops.merge_attention(s, b[part], b[part_lse], {b[table], b[count], 2, 1, 2, false, false}, b[o],
                        b[lse], b[o]);
  });
  CHECK(t.at(o).values() == std::vector<double>{3, 3.5, 4, 1, 2, 3, 1, 2, 3, 5, 5, 5});
  CHECK(std::abs(t.at(lse).get(0) - (1 + std::log(2.0))) < 1e-6);
  CHECK(t.at(lse).get(1) == 2000);
  CHECK(t.at(lse).get(2) == 7);
  CHECK(t.at(lse).get(3) == 2000);
}

// Three parts, of which the second has all rows: from o into a sum in S, into it again, and from it
// into what is rounded.
struct Merges {
  struct Part {
    Slot o, lse, table, count;
    std::vector<double> segments;
  };
  int64_t T, H, W;
  OpCase c;
  Slot o, lse, sum, out;
  std::vector<Part> parts;

  Merges(uint64_t seed, int64_t T_, int64_t H_, int64_t W_) : T(T_), H(H_), W(W_), c(seed) {
    o = c.normal({T, H, W});
    lse = c.stat(c.normal({T, H}));
    sum = c.stat(c.output({T, H, W}));
    out = c.output({T, H, W});
    const auto rows = [](int64_t n) { return static_cast<double>(n); };
    add_part({1, 1, 0, 1, 2, rows(T / 2 - 2), 1, 1, rows(T - 2), 1, 2, 1});
    add_part({0, rows(T), 0, 1});
    add_part({rows(T / 2), rows(T - T / 2), 0, 1});
  }
  void add_part(std::vector<double> segments) {
    const int64_t count = static_cast<int64_t>(segments.size()) / 4;
    Part part{c.normal({T, H, W}), c.stat(c.normal({T, H})), {}, {}, segments};
    segments.resize(segments.size() + 4, -1000);  // not read
    part.table = c.fixed(DType::i32, {count + 1, 4}, segments);
    part.count = c.fixed(DType::i32, {1}, {static_cast<double>(count)});
    parts.push_back(part);
  }
  OpBody body() const {
    return [m = *this](Ops& ops, Stream& s, const Bound& b) {
      for (size_t i = 0; i < m.parts.size(); ++i) {
        const Part& part = m.parts[i];
        const AttentionSegments segments{b[part.table],         b[part.count], m.T,  1,
                                         b[part.table].size(0), false,         false};
        ops.merge_attention(s, b[part.o], b[part.lse], segments, b[i == 0 ? m.o : m.sum], b[m.lse],
                            b[i + 1 == m.parts.size() ? m.out : m.sum]);
      }
    };
  }
  // By the definition: shares of all that a row has, in no order.
  void check(const Bound& done) const {
    const Bound before = c.bind(DType::f64);
    HostTensor want(DType::f64, {T, H, W}), want_lse(DType::f64, {T, H});
    for (int64_t pair = 0; pair < T * H; ++pair) {
      std::vector<std::pair<Slot, double>> all = {{o, std::exp(before.at(lse).get(pair))}};
      for (const Part& part : parts)
        for (size_t n = 0; n < part.segments.size(); n += 4) {
          const double row = static_cast<double>(pair / H) - part.segments[n];
          if (row >= 0 && row < part.segments[n + 1])
            all.emplace_back(part.o, std::exp(before.at(part.lse).get(pair)));
        }
      double total = 0;
      for (const auto& [slot, weight] : all) total += weight;
      want_lse.set(pair, std::log(total));
      for (int64_t i = pair * W; i < (pair + 1) * W; ++i)
        for (const auto& [slot, weight] : all)
          want.set(i, want.get(i) + weight / total * before.at(slot).get(i));
    }
    CHECK(compare_within(done.at(out), want, 1e-13));
    CHECK(compare_within(done.at(lse), want_lse, 1e-13));
  }
};

TEST_CASE("merge_attention: parts are summed in S and rounded once", "[core][op]") {
  const auto [T, H, W] =
      GENERATE(table<int64_t, int64_t, int64_t>({{9, 3, 5}, {70, 4, 64}, {12, 2, 2056}}));
  CAPTURE(T, H, W);
  const Merges m(64, T, H, W);
  const Tolerance plain{.sum_length = 4, .roundings = 8};
  m.check(check_op(m.c, m.body(), {{m.sum, plain}, {m.out, plain}, {m.lse, plain}}));
}

TEST_CASE("attention gradients agree with differences", "[core][ops]") {
  const int which = GENERATE(0, 1, 2, 3, 4, 5, 6);
  CAPTURE(which);
  const Attention a(52, which < 5 ? small(which) : of_others(which - 5));
  const std::vector<GradientPair> outputs = {{a.o, a.dout}};
  std::vector<GradientPair> inputs = {{a.q, a.dq}, {a.key, a.dk}, {a.v, a.dv}};
  if (which == 4) inputs = {{a.v, a.dv}};  // one key: dq and dk are zero
  CHECK(check_gradient(a.c, a.forward(), a.backward(), outputs, inputs));
}

TEST_CASE("attention gradients: a planted fault is noticed", "[core][ops]") {
  const size_t which = GENERATE(0u, 1u, 2u);
  const Attention a(53, small(1));
  const Slot faulty = std::array{a.dq, a.dk, a.dv}[which];
  const auto backward = [&](Ops& ops, Stream& s, const Bound& t) {
    a.backward()(ops, s, t);
    t[faulty].data<double>()[11] += 1e-5;
  };
  CHECK_FALSE(check_gradient(a.c, a.forward(), backward, {{a.o, a.dout}},
                             {{a.q, a.dq}, {a.key, a.dk}, {a.v, a.dv}}));
}

TEST_CASE("attention: rows in no segment are zero", "[core][op]") {
  const int64_t heads = GENERATE(2, 8);
  const Attention a(56, {6, 7, heads, heads, 3, 2, {1, 3, 2, 4}});
  const Bound t = run_op(a.c, DType::f32, 2, a.both());
  const auto zero = [&](Slot slot, int64_t row) {
    const int64_t width = t.at(slot).numel() / t[slot].size(0);
    for (int64_t i = 0; i < width; ++i)
      if (t.at(slot).get(row * width + i) != 0) return false;
    return true;
  };
  for (const int64_t row : {0, 4, 5})
    CHECK((zero(a.o, row) && zero(a.dq, row) && zero(a.lse, row)));
  for (const int64_t row : {0, 1, 6}) CHECK((zero(a.dk, row) && zero(a.dv, row)));
  for (const int64_t row : {1, 2, 3}) CHECK_FALSE(zero(a.o, row));
  for (const int64_t row : {2, 3, 4, 5}) CHECK_FALSE(zero(a.dv, row));
}

TEST_CASE("attention: no segments and no rows", "[core][op][cudnn]") {
  const Attention none(57, {3, 4, 1, 1, 2, 2, {}});
  const Bound t = run_op(none.c, DType::f32, 2, none.both());
  for (const Slot slot : {none.o, none.dq, none.dk, none.dv})
    for (const double value : t.at(slot).values()) CHECK(value == 0);
  for (const bool causal : {true, false}) {
    const Attention wide(61, {20, 20, 4, 2, 16, 8, {}, false, causal});
    const Tolerance zero{.expect_exact_zero = true};
    check_op(wide.c, wide.both(),
             {{wide.o, zero}, {wide.lse, zero}, {wide.dq, zero}, {wide.dk, zero}, {wide.dv, zero}});
  }
  const Attention empty(58, {0, 0, 2, 1, 2, 2, {}});
  CHECK_NOTHROW(run_op(empty.c, DType::f32, 2, empty.both()));
}

TEST_CASE("attention: a segment outside of its rows is refused", "[core][ops]") {
  const std::vector<double> table =
      GENERATE(std::vector<double>{0, 6, 0, 6}, std::vector<double>{0, 5, 0, 4},
               std::vector<double>{-1, 5, 0, 5}, std::vector<double>{0, 5, 1, 5});
  const Attention a(59, {5, 5, 1, 1, 2, 2, table});
  CHECK_THROWS(run_op(a.c, DType::f32, 1, a.forward()));
}

TEST_CASE("attention: large scores do not overflow", "[core][op]") {
  Attention a(60, {40, 40, 1, 1, 4, 4, {0, 40, 0, 40}});
  a.scale = 500;
  check_op(a.c, a.forward(), {});
  const Bound t = run_op(a.c, DType::f32, 1, a.both());
  for (const Slot slot : {a.o, a.lse, a.dq, a.dk, a.dv})
    for (const double value : t.at(slot).values()) REQUIRE(std::isfinite(value));
}

}  // namespace
}  // namespace dstrain::test
