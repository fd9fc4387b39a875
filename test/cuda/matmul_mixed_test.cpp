// Products of f32 with bf16 as products of bf16: the layout of the terms, and what their sum is
// worth.
#include "cuda/matmul_mixed.h"

#include <bit>
#include <cmath>
#include <vector>

#include "core/base/rng.h"
#include "test/support/catch.h"

namespace dstrain::test {
namespace {

// To the nearest, ties to even, of a number that f32 holds.
double to_bf16(double x) {
  uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x));
  bits += 0x7fff + (bits >> 16 & 1);
  return static_cast<double>(std::bit_cast<float>(bits & 0xffff0000u));
}

// As stack_kernel of cuda/ops_matmul.cu fills it; everything that it must not rely on is NaN.
std::vector<double> stacked(const std::vector<double>& x, int64_t rows, int64_t columns,
                            const Stack& stack, bool split) {
  std::vector<double> out(static_cast<size_t>(stack.numel()), NAN);
  for (int64_t r = 0; r < stack.rows; ++r) {
    for (int64_t c = 0; c < stack.columns; ++c) {
      const double value = r < rows && c < columns ? x[static_cast<size_t>(r * columns + c)] : 0;
      const double high = to_bf16(value), middle = to_bf16(value - high);
      const double terms[] = {to_bf16(value - high - middle), middle, high};
      for (int t = 0; t < Stack::kTerms; ++t) {
        double& place = out.at(static_cast<size_t>(t * stack.step + r * stack.stride + c));
        CHECK(std::isnan(place));  // no two terms share a place
        place = split ? terms[t] : value;
      }
    }
  }
  return out;
}

double element(const MatrixRef& x, Trans trans, int64_t i, int64_t j) {
  if (trans == Trans::yes) std::swap(i, j);
  return static_cast<const double*>(x.data)[i * x.stride + j];
}

// What cuBLASLt does, in double on matrices of double.
double product_element(const Product& p, int64_t i, int64_t j) {
  double sum = 0;
  for (int64_t k = 0; k < p.k; ++k) sum += element(p.a, p.ta, i, k) * element(p.b, p.tb, k, j);
  return sum;
}

TEST_CASE("matmul of f32 and bf16: three bf16 terms give the product to f32", "[core][cuda]") {
  const Trans ta = GENERATE(Trans::no, Trans::yes), tb = GENERATE(Trans::no, Trans::yes);
  const bool a_is_f32 = GENERATE(true, false);
  // Both ways of stacking, for either operand, and sizes that have to be filled up.
  const auto [m, n, k] = GENERATE(table<int64_t, int64_t, int64_t>(
      {{40, 24, 8}, {33, 17, 5}, {8, 24, 200}, {3, 17, 130}, {21, 2, 99}, {1, 1, 1}}));
  CAPTURE(ta, tb, a_is_f32, m, n, k);

  std::vector<double> a(static_cast<size_t>(m * k)), b(static_cast<size_t>(k * n));
  auto fill = [](std::vector<double>& x, bool f32, uint64_t stream) {
    for (size_t i = 0; i < x.size(); ++i) {
      const double value = random_normal(5, stream, i);
      x[i] = f32 ? static_cast<double>(static_cast<float>(value)) : to_bf16(value);
    }
  };
  fill(a, a_is_f32, 0);
  fill(b, !a_is_f32, 1);
  Product p{.ta = ta,
            .tb = tb,
            .m = m,
            .n = n,
            .k = k,
            .alpha = 0.5f,
            .beta = -1,
            .a = {},
            .b = {},
            .c = {}};
  p.a = {a.data(), a_is_f32 ? DType::f32 : DType::bf16, columns_of_a(p)};
  p.b = {b.data(), a_is_f32 ? DType::bf16 : DType::f32, columns_of_b(p)};
  p.c = {nullptr, DType::bf16, n};

  MixedProduct mixed(p);
  const auto &f32 = a_is_f32 ? a : b, &bf16 = a_is_f32 ? b : a;
  std::vector<double> split =
      stacked(f32, a_is_f32 ? rows_of_a(p) : rows_of_b(p),
              a_is_f32 ? columns_of_a(p) : columns_of_b(p), mixed.split, true);
  std::vector<double> copies =
      stacked(bf16, a_is_f32 ? rows_of_b(p) : rows_of_a(p),
              a_is_f32 ? columns_of_b(p) : columns_of_a(p), mixed.copies, false);
  mixed.place(split.data(), copies.data(), nullptr);
  CHECK(mixed.a_is_split == a_is_f32);
  CHECK(mixed.product.a.dtype == DType::bf16);
  CHECK(mixed.product.b.dtype == DType::bf16);
  CHECK(mixed.along_k == (mixed.sums.numel() == 0));
  CHECK((mixed.along_k ? copies : split).size() > 0);
  if (mixed.along_k) {
    CHECK(mixed.product.c.dtype == DType::bf16);
    CHECK(mixed.product.beta == -1);
  } else {
    CHECK(mixed.product.c.dtype == DType::f32);
    CHECK(mixed.product.beta == 0);
    CHECK(mixed.product.m * mixed.product.c.stride <= mixed.sums.numel());
  }

  double worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      if (mixed.along_k) {
        sum = product_element(mixed.product, i, j);
      } else {
        for (int t = 0; t < Stack::kTerms; ++t) {
          const int64_t at = t * mixed.sums.step + i * mixed.sums.stride + j,
                        stride = mixed.product.c.stride;
          CHECK(at % stride < mixed.product.n);
          sum += product_element(mixed.product, at / stride, at % stride);
        }
      }
      double size = 0;
      for (int64_t q = 0; q < k; ++q)
        size += std::fabs(element(p.a, ta, i, q) * element(p.b, tb, q, j));
      worst = std::max(worst, std::fabs(sum - product_element(p, i, j)) / size);
    }
  }
  CHECK(worst < 0x1p-23);  // NaN fails
}

TEST_CASE("matmul of f32 and bf16: a router's products copy the small operand", "[core][cuda]") {
  const int64_t T = 16384, E = 64, D = 2048;
  Product dx{.ta = Trans::no,
             .tb = Trans::no,
             .m = T,
             .n = D,
             .k = E,
             .alpha = 1,
             .beta = 1,
             .a = {nullptr, DType::f32, E},
             .b = {nullptr, DType::bf16, D},
             .c = {nullptr, DType::bf16, D}};
  MixedProduct of_input(dx);
  CHECK(of_input.along_k);
  CHECK(of_input.split_bytes() == T * E * 6);
  CHECK(of_input.copies_bytes() == E * D * 6);
  CHECK(of_input.product.k == 3 * E);

  Product dweight{.ta = Trans::yes,
                  .tb = Trans::no,
                  .m = E,
                  .n = D,
                  .k = T,
                  .alpha = 1,
                  .beta = 1,
                  .a = {nullptr, DType::f32, E},
                  .b = {nullptr, DType::bf16, D},
                  .c = {nullptr, DType::f32, D}};
  MixedProduct of_weight(dweight);
  CHECK_FALSE(of_weight.along_k);
  CHECK(of_weight.split_bytes() == T * E * 6);
  CHECK(of_weight.sums_bytes() == E * D * 12);
  CHECK(of_weight.product.m == 3 * E);
}

TEST_CASE("matmul keys: alignment is that of every row", "[core][cuda]") {
  alignas(512) static char memory[512];
  CHECK(row_alignment({memory, DType::bf16, 8}) == 256);
  CHECK(row_alignment({memory + 32, DType::bf16, 8}) == 32);
  CHECK(row_alignment({memory + 8, DType::bf16, 8}) == 8);
  CHECK(row_alignment({nullptr, DType::bf16, 64}) == 256);
  CHECK(row_alignment({memory, DType::bf16, 12}) == 8);
  CHECK(row_alignment({memory, DType::bf16, 7}) == 2);
  CHECK(row_alignment({memory, DType::f32, 7}) == 4);
  CHECK(row_alignment({memory + 4, DType::bf16, 8}) == 4);
  Product p{.ta = Trans::no,
            .tb = Trans::yes,
            .m = 3,
            .n = 4,
            .k = 8,
            .alpha = 1,
            .beta = 1,
            .a = {memory, DType::bf16, 8},
            .b = {memory, DType::bf16, 12},
            .c = {memory, DType::f32, 4}};
  CHECK(key_text(key_of(p, true)) == "bf16,nt,3x4x8,+f32,8:256,12:8,4:256");
  CHECK(shape_text(key_of(p, true)) == "bf16 nt 3x4x8 +f32");
  Product other = p;
  other.beta = 0;
  CHECK_FALSE(key_of(p, true) == key_of(other, true));
  p.a.dtype = p.b.dtype = DType::f32;
  CHECK(key_of(p, true).tf32);
  CHECK_FALSE(key_of(p, false).tf32);
}

}  // namespace
}  // namespace dstrain::test
