// Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467) fused with the residual
// addition before it.
//   sum = x + delta,  rstd = 1 / sqrt(mean_d(sum^2) + eps),  y = sum * rstd * weight
// Backward, with g = dy * weight and s = sum * rstd:
//   dsum = rstd * (g - s * mean_d(g * s)),  dweight = sum over tokens of dy * s
// T tokens, D columns. Row sums are lane sums in F.
#include <algorithm>
#include <cmath>

#include "core/backend/cpu_ops.h"

namespace dstrain {
namespace {

template <class F>
void add_rows(const F* a, const F* b, int64_t n, F* out) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) out[d] = a[d] + b[d];
}

template <class F>
F normalize_row(const F* x, const F* weight, int64_t n, double eps, F* y) {
  const F sum_squares = lane_sum<F>(n, [x](int64_t d) { return x[d] * x[d]; });
  const double mean = static_cast<double>(sum_squares) / static_cast<double>(n);
  const F rstd = static_cast<F>(1 / std::sqrt(mean + eps));
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) y[d] = x[d] * rstd * weight[d];
  return rstd;
}

// Adds the row's share to dweight. dresidual may be null; dx may be the same memory.
template <class F>
void normalize_row_backward(const F* dy, const F* x, const F* weight, F rstd, const F* dresidual,
                            int64_t n, F* dx, F* dweight) {
  const F dot = lane_sum<F>(n, [=](int64_t d) { return dy[d] * weight[d] * x[d]; });
  const F shift = dot * rstd * rstd / static_cast<F>(n);
  if (dresidual) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) {
      dweight[d] += dy[d] * (x[d] * rstd);
      dx[d] = dresidual[d] + rstd * (dy[d] * weight[d] - x[d] * shift);
    }
  } else {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) {
      dweight[d] += dy[d] * (x[d] * rstd);
      dx[d] = rstd * (dy[d] * weight[d] - x[d] * shift);
    }
  }
}

}  // namespace

void CpuOps::add_rms_norm(Stream&, const Tensor& x_TD, const Tensor& delta_TD,
                          const Tensor& weight_D, double eps, const Tensor& sum_TD,
                          const Tensor& y_TD, const Tensor& rstd_T) {
  const DType dtype = x_TD.dtype();
  DSTRAIN_CHECK(x_TD.dims() == 2, "add_rms_norm: x_TD is " + x_TD.describe());
  const int64_t T = x_TD.size(0), D = x_TD.size(1);
  expect(weight_D, "add_rms_norm: weight_D", dtype, {D});
  expect_strided(y_TD, "add_rms_norm: y_TD", dtype, {T, D});
  expect(rstd_T, "add_rms_norm: rstd_T", dtype, {T});
  if (delta_TD.defined()) expect_strided(delta_TD, "add_rms_norm: delta_TD", dtype, {T, D});
  if (delta_TD.defined() || sum_TD.defined())
    expect_strided(sum_TD, "add_rms_norm: sum_TD", dtype, {T, D});
  if (T == 0 || D == 0) return;
  dispatch_float(dtype, [&]<class F>() {
    pool_.run_ranges(T, rows_per_task(D), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const F* x = row<F>(x_TD, t);
        if (delta_TD.defined()) {
          F* sum = row<F>(sum_TD, t);
          add_rows(x, row<F>(delta_TD, t), D, sum);
          x = sum;
        } else if (sum_TD.defined() && row<F>(sum_TD, t) != x) {
          std::copy_n(x, D, row<F>(sum_TD, t));
        }
        rstd_T.data<F>()[t] = normalize_row(x, weight_D.data<F>(), D, eps, row<F>(y_TD, t));
      }
    });
  });
}

void CpuOps::rms_norm_backward(Stream&, const Tensor& dy_TD, const Tensor& x_TD,
                               const Tensor& weight_D, const Tensor& rstd_T,
                               const Tensor& dresidual_TD, Accumulate accumulate,
                               const Tensor& dx_TD, const Tensor& dweight_D) {
  const DType dtype = x_TD.dtype();
  DSTRAIN_CHECK(x_TD.dims() == 2, "rms_norm_backward: x_TD is " + x_TD.describe());
  const int64_t T = x_TD.size(0), D = x_TD.size(1);
  expect_strided(dy_TD, "rms_norm_backward: dy_TD", dtype, {T, D});
  expect(weight_D, "rms_norm_backward: weight_D", dtype, {D});
  expect(rstd_T, "rms_norm_backward: rstd_T", dtype, {T});
  expect_strided(dx_TD, "rms_norm_backward: dx_TD", dtype, {T, D});
  expect(dweight_D, "rms_norm_backward: dweight_D", dtype, {D});
  if (dresidual_TD.defined()) {
    expect_strided(dresidual_TD, "rms_norm_backward: dresidual_TD", dtype, {T, D});
  }
  dispatch_float(dtype, [&]<class F>() {
    const int64_t stride = partial_stride<F>(D);
    const RowChunks chunks(T, stride * static_cast<int64_t>(sizeof(F)), /*min_rows=*/32);
    F* const partials = workspace_.get<F>(chunks.count * stride);
    pool_.run(chunks.count, [&](int64_t chunk, void*) {
      F* const partial = partials + chunk * stride;
      std::fill(partial, partial + D, F(0));
      for (int64_t t = chunks.begin(chunk); t < chunks.end(chunk); ++t) {
        const F* dresidual = dresidual_TD.defined() ? row<F>(dresidual_TD, t) : nullptr;
        normalize_row_backward(row<F>(dy_TD, t), row<F>(x_TD, t), weight_D.data<F>(),
                               rstd_T.data<F>()[t], dresidual, D, row<F>(dx_TD, t), partial);
      }
    });
    sum_partials(pool_, partials, chunks.count, stride, D, accumulate, dweight_D.data<F>());
  });
}

}  // namespace dstrain
