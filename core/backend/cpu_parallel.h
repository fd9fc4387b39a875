// What the files cpu_ops_*.cpp share: the choice of the element type, the cut of rows into tasks, and
// sums whose order depends on the problem's size only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/backend/expect.h"
#include "core/backend/ops.h"
#include "core/backend/thread_pool.h"
#include "core/tensor/tensor.h"

namespace dstrain {

// Calls body.operator()<float>() or <double>(). Throws for any other type.
template <class Body>
void dispatch_float(DType dtype, const Body& body) {
  DSTRAIN_CHECK(dtype == DType::f32 || dtype == DType::f64,
                std::string("the CPU computes in f32 and f64, not in ") + dtype_name(dtype));
  if (dtype == DType::f32) {
    body.template operator()<float>();
  } else {
    body.template operator()<double>();
  }
}

// The first element of row t.
template <class F>
F* row(const Tensor& tensor, int64_t t) {
  return tensor.data<F>() + t * tensor.row_stride();
}

// Rows for one task of a loop over rows that is bound by memory: enough to hide the cost of a task.
inline int64_t rows_per_task(int64_t row_elements) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_elements));
}

// Memory for the partial results of a reduction in two phases. All threads see it; it is valid
// until the op returns.
class Workspace {
 public:
  static constexpr int64_t kBytes = int64_t{4} << 20;

  template <class T>
  T* get(int64_t count) const {
    DSTRAIN_CHECK(count * static_cast<int64_t>(sizeof(T)) <= kBytes,
                  "a reduction needs " + std::to_string(count * sizeof(T)) +
                      " bytes for its partial results, more than there are");
    return reinterpret_cast<T*>(block_->bytes);
  }

 private:
  struct alignas(64) Block {
    std::byte bytes[kBytes];
  };
  std::unique_ptr<Block> block_ = std::make_unique_for_overwrite<Block>();
};

// A cut of `rows` into at most 64 runs of equal length (the last may be shorter), of at least
// `min_rows` rows, so that one partial result of `partial_bytes` per run fits the workspace.
struct RowChunks {
  int64_t count = 0, length = 0, rows = 0;

  RowChunks(int64_t rows_, int64_t partial_bytes, int64_t min_rows) : rows(rows_) {
    const int64_t room = Workspace::kBytes / std::max<int64_t>(1, partial_bytes);
    const int64_t most = std::clamp<int64_t>(room, 1, 64);
    length = std::max(min_rows, (rows + most - 1) / most);
    count = (rows + length - 1) / length;
  }
  int64_t begin(int64_t chunk) const { return chunk * length; }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * length); }
};

// A stride for partial results of `width` elements that keeps two threads off one cache line.
template <class T>
int64_t partial_stride(int64_t width) {
  constexpr int64_t kPerLine = 64 / sizeof(T);
  return (width + kPerLine - 1) / kPerLine * kPerLine;
}

// out[j] (+)= partials[0][j] + partials[1][j] + ... in this order.
template <class F>
void sum_partials(ThreadPool& pool, const F* partials, int64_t count, int64_t stride, int64_t width,
                  Accumulate accumulate, F* out) {
  constexpr int64_t kBlock = 256;
  pool.run_ranges(width, kBlock, [&](int64_t begin, int64_t end) {
    F sum[kBlock] = {};
    const int64_t n = end - begin;
    for (int64_t c = 0; c < count; ++c) {
      const F* partial = partials + c * stride + begin;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) sum[j] += partial[j];
    }
    for (int64_t j = 0; j < n; ++j) {
      out[begin + j] = accumulate == Accumulate::add ? out[begin + j] + sum[j] : sum[j];
    }
  });
}

// term(0) + ... + term(n - 1) in type S, as 64 interleaved sums that are then added in pairs: fast
// in SIMD registers, and the error grows with n / 64 instead of n.
template <class S, class Term>
S lane_sum(int64_t n, const Term& term) {
  constexpr int64_t kLanes = 64;
  S lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
  }
  const int64_t rest = n - i;
#pragma omp simd
  for (int64_t j = 0; j < rest; ++j) lanes[j] += term(i + j);
#pragma omp simd
  for (int64_t j = 0; j < 32; ++j) lanes[j] += lanes[j + 32];
#pragma omp simd
  for (int64_t j = 0; j < 16; ++j) lanes[j] += lanes[j + 16];
#pragma omp simd
  for (int64_t j = 0; j < 8; ++j) lanes[j] += lanes[j + 8];
#pragma omp simd
  for (int64_t j = 0; j < 4; ++j) lanes[j] += lanes[j + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

}  // namespace dstrain
