// T tokens, V rows of the vocabulary held here, D columns.
#include "test/support/catch.h"
#include "test/support/op_check.h"

namespace dstrain::test {

TEST_CASE("embedding: f32 agrees with f64, both ways, and threads do not matter", "[op]") {
  // The slice holds tokens [3, 3 + V) of [0, V + 6).
  const auto [T, V, D] = GENERATE(table<int64_t, int64_t, int64_t>({{0, 4, 8},
                                                                    {1, 1, 1},
                                                                    {50, 7, 65},
                                                                    {2048, 300, 64},
                                                                    {513, 5, 200},
                                                                    {40, 6, 2112},
                                                                    {3000, 1, 24},
                                                                    {20000, 40, 8},
                                                                    {5000, 700, 8},
                                                                    {40000, 600, 4}}));
  const auto accumulate = GENERATE(Accumulate::overwrite, Accumulate::add);
  CAPTURE(T, V, D, accumulate == Accumulate::add);
  OpCase c(61);
  std::vector<double> numbers;
  for (int64_t t = 0; t < T; ++t) numbers.push_back(static_cast<double>((t * t + 3) % (V + 6)));
  const Slot tokens = c.fixed(DType::i32, {T}, numbers), weight = c.normal({V, D});
  const Slot x = c.output({T, D}), dx = c.normal({T, D});
  const Slot dweight = c.stat(c.normal({V, D}));
  const Bound before = c.bind(DType::f64);
  const Bound b =
      check_op(c,
               [&](Ops& ops, Stream& s, const Bound& t) {
                 ops.embedding(s, t[tokens], t[weight], 3, t[x]);
                 ops.embedding_backward(s, t[tokens], t[dx], 3, accumulate, t[dweight]);
               },
               {{x, {}},
                {dweight,
                 {.sum_length = T + 1,
                  .expect_exact_zero = T == 0 && accumulate == Accumulate::overwrite}}});
  HostTensor expected_x(DType::f64, {T, D}), expected(DType::f64, {V, D});
  if (accumulate == Accumulate::add) expected = before.at(dweight);
  for (int64_t i = 0; i < T * D; ++i) {
    const int64_t v = static_cast<int64_t>(numbers[static_cast<size_t>(i / D)]) - 3, d = i % D;
    if (v < 0 || v >= V) continue;
    expected_x.set(i, before.at(weight).get(v * D + d));
    expected.set(v * D + d, expected.get(v * D + d) + before.at(dx).get(i));
  }
  CHECK(b.at(x).same_bits(expected_x));
  CHECK(b.at(dweight).same_bits(expected));  // the same order of addition: ascending tokens
}

TEST_CASE("embedding: gradient, and a fault turns the check red", "[ops]") {
  OpCase c(62);
  const Slot tokens = c.fixed(DType::i32, {6}, {2, 0, 2, 9, 1, 2}), weight = c.normal({4, 3});
  const Slot x = c.output({6, 3}), dx = c.normal({6, 3}), dweight = c.output({4, 3});
  const auto check = [&](int64_t vocab_begin) {
    return check_gradient(
        c,
        [&](Ops& ops, Stream& s, const Bound& b) {
          ops.embedding(s, b[tokens], b[weight], 0, b[x]);
        },
        [&](Ops& ops, Stream& s, const Bound& b) {
          ops.embedding_backward(s, b[tokens], b[dx], vocab_begin, Accumulate::overwrite,
                                 b[dweight]);
        },
        {{x, dx}}, {{weight, dweight}});
  };
  CHECK(check(0));
  CHECK_FALSE(check(1));
}

TEST_CASE("embedding: shapes that do not fit are named", "[ops]") {
  OpCase c(63);
  const Slot tokens = c.fixed(DType::i32, {2}, {0, 1}), weight = c.normal({4, 3});
  const Slot x = c.output({3, 3});
  CHECK_THROWS_WITH(run_op(c, DType::f32, 1,
                           [&](Ops& ops, Stream& s, const Bound& b) {
                             ops.embedding(s, b[tokens], b[weight], 0, b[x]);
                           }),
                    Catch::Contains("embedding: tokens i32[2], weight f32[4, 3], x f32[3, 3]"));
}

}  // namespace dstrain::test
