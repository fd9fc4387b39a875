// Root-mean-square normalisation fused with the residual addition before it. T tokens, D columns:
//   sum_TD = x_TD + delta_TD,  rstd_T = 1 / sqrt(mean_d(sum_td^2) + eps),
//   y_td = sum_td * rstd_t * weight_d
// sum is rounded to F before its statistics are taken; all arithmetic is f32. A row of up to 2048
// vectors of 16 bytes stays in registers, so that each operand is moved once; longer or unaligned
// rows are read twice.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/norm.cuh"
#include "cuda/pack.cuh"

namespace dstrain {
namespace {

constexpr int kRowsOfWarps = 4;  // rows of a block where a row has one warp

// x may be sum: nothing here is __restrict__, and a thread reads what it then writes. delta and sum
// may be null.
template <class F>
struct Norm {
  const F* x;
  const F* delta;
  const F* weight;
  F* sum;
  F* y;
  float* rstd;
  int64_t x_stride, delta_stride, sum_stride, y_stride;
  int64_t tokens, columns;
  float eps;

  __device__ float rstd_of(float squares) const {
    return 1.0f / sqrtf(squares / static_cast<float>(columns) + eps);
  }
};

// blockDim.x threads for a row, blockDim.y rows (1 unless a row has one warp); kPacks vectors of
// the row a thread.
template <class F, int kPacks>
__global__ void __launch_bounds__(kMostNormThreads) add_rms_norm_kernel(const Norm<F> a) {
  constexpr int kSize = kVector<F>;
  using P = Pack<F, kSize>;
  __shared__ float shared[32];
  const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (t >= a.tokens) return;
  P x[kPacks] = {}, delta[kPacks] = {}, weight[kPacks] = {};
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t d = int64_t{threadIdx.x + p * blockDim.x} * kSize;
    if (d >= a.columns) break;
    x[p] = P::load(a.x + t * a.x_stride + d);
    if (a.delta) delta[p] = P::load(a.delta + t * a.delta_stride + d);
    weight[p] = P::load(a.weight + d);
  }
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t d = int64_t{threadIdx.x + p * blockDim.x} * kSize;
    if (d >= a.columns) break;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (a.delta) x[p].at[j] = from_float<F>(to_float(x[p].at[j]) + to_float(delta[p].at[j]));
      squares += to_float(x[p].at[j]) * to_float(x[p].at[j]);
    }
    if (a.sum) x[p].store(a.sum + t * a.sum_stride + d);
  }
  const float rstd = a.rstd_of(row_sum(squares, shared));
  if (threadIdx.x == 0) a.rstd[t] = rstd;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t d = int64_t{threadIdx.x + p * blockDim.x} * kSize;
    if (d >= a.columns) break;
    P y;
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      y.at[j] = from_float<F>(to_float(x[p].at[j]) * rstd * to_float(weight[p].at[j]));
    y.store(a.y + t * a.y_stride + d);
  }
}

template <class F>
__global__ void __launch_bounds__(kNormLoopThreads) add_rms_norm_loop_kernel(const Norm<F> a) {
  __shared__ float shared[32];
  const int64_t t = blockIdx.x;
  const F* x = a.x + t * a.x_stride;
  F* const sum = a.sum ? a.sum + t * a.sum_stride : nullptr;
  float squares = 0;
  for (int64_t d = threadIdx.x; d < a.columns; d += kNormLoopThreads) {
    F value = x[d];
    if (a.delta) value = from_float<F>(to_float(value) + to_float(a.delta[t * a.delta_stride + d]));
    if (sum) sum[d] = value;
    squares += to_float(value) * to_float(value);
  }
  const float rstd = a.rstd_of(row_sum(squares, shared));
  if (threadIdx.x == 0) a.rstd[t] = rstd;
  if (sum) x = sum;  // each thread reads what it wrote
  for (int64_t d = threadIdx.x; d < a.columns; d += kNormLoopThreads)
    a.y[t * a.y_stride + d] = from_float<F>(to_float(x[d]) * rstd * to_float(a.weight[d]));
}

template <class F>
void launch_norm(const Norm<F>& norm, bool vectors, cudaStream_t stream) {
  const int64_t n = norm.columns / kVector<F>;
  const auto launch = [&](void (*kernel)(Norm<F>), int64_t packs) {
    const auto threads = static_cast<unsigned>(ceil_div(ceil_div(n, packs), 32) * 32);
    const unsigned rows = threads == 32 ? kRowsOfWarps : 1;
    const auto blocks = static_cast<unsigned>(ceil_div(norm.tokens, rows));
    kernel<<<blocks, dim3(threads, rows), 0, stream>>>(norm);
  };
  if (!vectors || n > 4 * kMostNormThreads) {
    add_rms_norm_loop_kernel<F>
        <<<static_cast<unsigned>(norm.tokens), kNormLoopThreads, 0, stream>>>(norm);
  } else if (n <= 32) {
    launch(add_rms_norm_kernel<F, 1>, 1);
  } else if (n <= 512) {
    launch(add_rms_norm_kernel<F, 2>, 2);
  } else {
    launch(add_rms_norm_kernel<F, 4>, 4);
  }
}

}  // namespace

void CudaOps::add_rms_norm(Stream& stream, const Tensor& x_TD, const Tensor& delta_TD,
                           const Tensor& weight_D, double eps, const Tensor& sum_TD,
                           const Tensor& y_TD, const Tensor& rstd_T) {
  const DType dtype = x_TD.dtype();
  DSTRAIN_CHECK(x_TD.dims() == 2, "add_rms_norm: x_TD is " + x_TD.describe());
  const int64_t T = x_TD.size(0), D = x_TD.size(1);
  expect(weight_D, "add_rms_norm: weight_D", dtype, {D});
  expect_strided(y_TD, "add_rms_norm: y_TD", dtype, {T, D});
  expect(rstd_T, "add_rms_norm: rstd_T", DType::f32, {T});
  if (delta_TD.defined()) expect_strided(delta_TD, "add_rms_norm: delta_TD", dtype, {T, D});
  if (delta_TD.defined() || sum_TD.defined())
    expect_strided(sum_TD, "add_rms_norm: sum_TD", dtype, {T, D});
  if (T == 0 || D == 0) return;
  const bool store_sum = delta_TD.defined() || sum_TD.raw() != x_TD.raw();
  dispatch_f(dtype, "add_rms_norm", [&]<class F>() {
    const Norm<F> norm{.x = pointer<F>(x_TD),
                       .delta = pointer<F>(delta_TD),
                       .weight = pointer<F>(weight_D),
                       .sum = store_sum ? pointer<F>(sum_TD) : nullptr,
                       .y = pointer<F>(y_TD),
                       .rstd = pointer<float>(rstd_T),
                       .x_stride = x_TD.row_stride(),
                       .delta_stride = delta_TD.row_stride(),
                       .sum_stride = sum_TD.row_stride(),
                       .y_stride = y_TD.row_stride(),
                       .tokens = T,
                       .columns = D,
                       .eps = static_cast<float>(eps)};
    const bool vectors = rows_fit_vectors<F>(x_TD) && rows_fit_vectors<F>(delta_TD) &&
                         rows_fit_vectors<F>(weight_D) && rows_fit_vectors<F>(sum_TD) &&
                         rows_fit_vectors<F>(y_TD);
    launch_norm(norm, vectors, cuda(stream));
  });
  check_launch("add_rms_norm");
}

}  // namespace dstrain
