#include "core/backend/cpu_gemm.h"

#include <algorithm>
#include <bit>
#include <string>

#include "core/base/error.h"

#ifdef DSTRAIN_HAVE_DNNL
#include <oneapi/dnnl/dnnl.h>
#else
#include <cblas.h>
extern "C" void openblas_set_num_threads(int threads) __attribute__((weak));
#endif

namespace dstrain {
namespace {

// c = beta * c
template <class F>
void scale_rows(int64_t m, int64_t n, F beta, F* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    F* const row = c + i * ldc;
    if (beta == F(0)) {
      std::fill_n(row, n, F(0));
    } else if (beta != F(1)) {
      for (int64_t j = 0; j < n; ++j) row[j] *= beta;
    }
  }
}

constexpr int64_t kBlock = 64;

// A block of op(b), rows k0.. and columns j0.., laid out row by row.
template <class F>
void pack_block(Trans tb, const F* b, int64_t ldb, int64_t k0, int64_t j0, int64_t rows,
                int64_t columns, F* packed) {
  for (int64_t k = 0; k < rows; ++k) {
    for (int64_t j = 0; j < columns; ++j) {
      packed[k * kBlock + j] =
          tb == Trans::no ? b[(k0 + k) * ldb + j0 + j] : b[(j0 + j) * ldb + k0 + k];
    }
  }
}

// c += alpha * op(a) op(b): a block of op(b) at a time, rows of c in registers and cache.
template <class F>
void add_product(Trans ta, Trans tb, int64_t m, int64_t n, int64_t k, F alpha, const F* a,
                 int64_t lda, const F* b, int64_t ldb, F* c, int64_t ldc) {
  F packed[kBlock * kBlock];
  for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
    const int64_t columns = std::min(kBlock, n - j0);
    for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
      const int64_t depth = std::min(kBlock, k - k0);
      pack_block(tb, b, ldb, k0, j0, depth, columns, packed);
      for (int64_t i = 0; i < m; ++i) {
        F* const row = c + i * ldc + j0;
        for (int64_t p = 0; p < depth; ++p) {
          const F factor = alpha * (ta == Trans::no ? a[i * lda + k0 + p] : a[(k0 + p) * lda + i]);
          const F* const b_row = packed + p * kBlock;
#pragma omp simd
          for (int64_t j = 0; j < columns; ++j) row[j] += factor * b_row[j];
        }
      }
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

void gemm(Trans ta, Trans tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  if (m <= 0 || n <= 0) return;
  if (k <= 0) return scale_rows(m, n, beta, c, ldc);
#ifdef DSTRAIN_HAVE_DNNL
  const dnnl_status_t status =
      dnnl_sgemm(ta == Trans::yes ? 'T' : 'N', tb == Trans::yes ? 'T' : 'N', m, n, k, alpha, a, lda,
                 b, ldb, beta, c, ldc);
  DSTRAIN_CHECK(status == dnnl_success, "dnnl_sgemm refused a product of " + std::to_string(m) +
                                            " x " + std::to_string(n) + " x " + std::to_string(k));
#else
  const auto narrow = [](int64_t value) {
    DSTRAIN_CHECK(value <= INT32_MAX, "a matrix is too large for CBLAS");
    return static_cast<int>(value);
  };
  const auto op = [](Trans t) { return t == Trans::yes ? CblasTrans : CblasNoTrans; };
  cblas_sgemm(CblasRowMajor, op(ta), op(tb), narrow(m), narrow(n), narrow(k), alpha, a, narrow(lda),
              b, narrow(ldb), beta, c, narrow(ldc));
#endif
}

void gemm(Trans ta, Trans tb, int64_t m, int64_t n, int64_t k, double alpha, const double* a,
          int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc) {
  if (m <= 0 || n <= 0) return;
  scale_rows(m, n, beta, c, ldc);
  add_product(ta, tb, m, n, k, alpha, a, lda, b, ldb, c, ldc);
}

std::string gemm_library() {
#ifdef DSTRAIN_HAVE_DNNL
  const dnnl_version_t* const v = dnnl_version();
  return "oneDNN " + std::to_string(v->major) + "." + std::to_string(v->minor) + "." +
         std::to_string(v->patch);
#else
  return "CBLAS";
#endif
}

void keep_gemm_single_threaded() {
#ifndef DSTRAIN_HAVE_DNNL
  if (openblas_set_num_threads) openblas_set_num_threads(1);
#endif
}

// dnnl_sgemm reaches 95% of an AVX-512 core's peak on tiles of 32 rows and 128 columns, except
// where the right operand is transposed: it copies that operand first, so tiles have more rows
// there.
TilePlan plan_tiles(const ProductShape& shape, int64_t groups, int64_t rows_limit) {
  constexpr int64_t kEnoughTiles = 16;  // to keep as many threads busy
  constexpr double kSmallTile = 6e6;    // multiply-adds of about 100 microseconds
  const auto [ta, tb, m, n, k] = shape;
  const bool copies_b = ta == Trans::no && tb == Trans::yes;
  const int64_t most_rows = std::clamp<int64_t>(rows_limit, 1, copies_b ? 320 : 128);
  const int64_t min_rows = copies_b ? 128 : 32, min_columns = 128;
  TilePlan plan;
  if (m <= 0 || n <= 0) return plan;
  // Powers of two divide evenly over the usual numbers of threads.
  plan.row_tiles =
      static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(ceil_div(m, most_rows))));
  plan.column_tiles = ceil_div(n, 512);
  while (groups * plan.row_tiles * plan.column_tiles < kEnoughTiles) {
    const int64_t rows = ceil_div(m, plan.row_tiles), columns = ceil_div(n, plan.column_tiles);
    const bool cut_rows = rows >= 2 * min_rows, cut_columns = columns >= 2 * min_columns;
    const auto work =
        static_cast<double>(std::max<int64_t>(rows, 32)) * static_cast<double>(columns * k);
    if (work <= kSmallTile || !(cut_rows || cut_columns)) break;
    if (cut_rows && (!cut_columns || rows * min_columns >= columns * min_rows)) {
      plan.row_tiles *= 2;
    } else {
      plan.column_tiles *= 2;
    }
  }
  plan.rows = ceil_div(m, plan.row_tiles);
  plan.columns = ceil_div(ceil_div(n, plan.column_tiles), 16) * 16;
  plan.row_tiles = ceil_div(m, plan.rows);
  plan.column_tiles = ceil_div(n, plan.columns);
  return plan;
}

}  // namespace dstrain
