// Matrix products of row-major matrices on one thread: c[m,n] = alpha * op(a) op(b) + beta * c,
// where op(a) is m x k and op(b) is k x n. Leading dimensions count elements from one row to the
// next. f32 goes through oneDNN's dnnl_sgemm (CBLAS in a build without oneDNN), f64 through own
// code.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/backend/ops.h"

namespace dstrain {

// beta 0 ignores what c held; k = 0 only scales c. Results depend on the arguments alone.
void gemm(Trans ta, Trans tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
void gemm(Trans ta, Trans tb, int64_t m, int64_t n, int64_t k, double alpha, const double* a,
          int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc);

// "oneDNN 2.6.3", or "CBLAS".
std::string gemm_library();

// Tells an OpenBLAS behind CBLAS to stay in the thread that calls it. oneDNN asks OpenMP instead,
// which each thread of a pool answers for itself.
void keep_gemm_single_threaded();

// A product c[m,n] = op(a) op(b) over k.
struct ProductShape {
  Trans ta = Trans::no, tb = Trans::no;
  int64_t m = 0, n = 0, k = 0;
  bool operator==(const ProductShape&) const = default;
};

// Output tiles of a product. They follow from its sizes alone, so that its bits do not depend on
// the number of threads.
struct TilePlan {
  int64_t rows = 1, columns = 1;  // of a tile; the last ones may be smaller
  int64_t row_tiles = 0, column_tiles = 0;
};
// `groups` products of this shape run side by side; `rows_limit` bounds the rows of a tile (what
// fits into scratch memory).
TilePlan plan_tiles(const ProductShape& shape, int64_t groups = 1, int64_t rows_limit = INT64_MAX);

// The products of a step, for measuring what they cost alone: one entry per group of a grouped
// product and per block of attention. Thread-safe.
class MatmulLog {
 public:
  void add(const ProductShape& product) {
    const std::lock_guard lock(mutex_);
    products_.push_back(product);
  }
  // What was added since the last take().
  std::vector<ProductShape> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(products_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<ProductShape> products_;
};

}  // namespace dstrain
