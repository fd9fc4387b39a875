// Root-mean-square normalisation fused with the residual addition before it, and its gradient
// (formulas: core/backend/cpu_ops_norm.cpp). T tokens, D columns. sum is rounded to F before its
// statistics are taken; all arithmetic is f32. A row of up to 2048 vectors stays in registers, so
// that each operand is moved once; longer or unaligned rows are read twice.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/pack.cuh"
#include "cuda/partial_sums.h"
#include "cuda/planning_ops.h"

namespace dstrain {
namespace {

constexpr int kMostThreads = 512;  // of a row in registers
constexpr int kLoopThreads = 256;
constexpr int kRowsOfWarps = 4;  // rows of a block where a row has one warp

// The sum over the threads of a row: blockDim.x, whole warps. One barrier, so `shared` may be used
// again only after another one.
__device__ __forceinline__ float row_sum(float x, float* shared) {
  x = warp_sum(x);
  if (blockDim.x == 32) return x;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.0f);
}

// x may be sum, and dresidual dx: nothing here is __restrict__, and a thread reads what it then
// writes.
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
__global__ void __launch_bounds__(kMostThreads) add_rms_norm_kernel(const Norm<F> a) {
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
__global__ void __launch_bounds__(kLoopThreads) add_rms_norm_loop_kernel(const Norm<F> a) {
  __shared__ float shared[32];
  const int64_t t = blockIdx.x;
  const F* x = a.x + t * a.x_stride;
  F* const sum = a.sum ? a.sum + t * a.sum_stride : nullptr;
  float squares = 0;
  for (int64_t d = threadIdx.x; d < a.columns; d += kLoopThreads) {
    F value = x[d];
    if (a.delta) value = from_float<F>(to_float(value) + to_float(a.delta[t * a.delta_stride + d]));
    if (sum) sum[d] = value;
    squares += to_float(value) * to_float(value);
  }
  const float rstd = a.rstd_of(row_sum(squares, shared));
  if (threadIdx.x == 0) a.rstd[t] = rstd;
  if (sum) x = sum;  // each thread reads what it wrote
  for (int64_t d = threadIdx.x; d < a.columns; d += kLoopThreads)
    a.y[t * a.y_stride + d] = from_float<F>(to_float(x[d]) * rstd * to_float(a.weight[d]));
}

template <class F>
struct NormBackward {
  const F* dy;
  const F* x;
  const F* weight;
  const float* rstd;
  const F* dresidual;
  F* dx;
  float* dweight_PD;  // one partial sum for each part of the rows
  int64_t dy_stride, x_stride, dresidual_stride, dx_stride;
  int64_t tokens, columns, rows_of_part;

  // What the mean takes off g, as a factor of x.
  __device__ float shift_of(float dot, float rstd_t) const {
    return dot * rstd_t * rstd_t / static_cast<float>(columns);
  }
};

// The vectors of one row that a thread has.
template <class F, int kPacks>
struct BackwardRow {
  using P = Pack<F, kVector<F>>;
  P dy[kPacks], x[kPacks], dresidual[kPacks];
  float rstd;

  __device__ __forceinline__ void load(const NormBackward<F>& a, int64_t t) {
    rstd = a.rstd[t];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t d = int64_t{threadIdx.x + p * blockDim.x} * kVector<F>;
      if (d >= a.columns) break;
      dy[p] = P::load(a.dy + t * a.dy_stride + d);
      x[p] = P::load(a.x + t * a.x_stride + d);
      if (a.dresidual) dresidual[p] = P::load(a.dresidual + t * a.dresidual_stride + d);
    }
  }
};

// A block takes one part of the rows, with the next row on its way while it computes one.
template <class F, int kPacks>
__global__ void __launch_bounds__(kMostThreads, kPacks == 1 ? 2 : 1)
    rms_norm_backward_kernel(const NormBackward<F> a) {
  constexpr int kSize = kVector<F>;
  constexpr bool kAhead = kPacks <= 2;  // more would not fit into registers
  using P = Pack<F, kSize>;
  __shared__ float shared[2][32];
  const int64_t begin = blockIdx.x * a.rows_of_part, end = min(a.tokens, begin + a.rows_of_part);
  P weight[kPacks] = {};
  Pack<float, kSize> dweight[kPacks] = {};
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t d = int64_t{threadIdx.x + p * blockDim.x} * kSize;
    if (d < a.columns) weight[p] = P::load(a.weight + d);
  }
  BackwardRow<F, kPacks> row = {}, next = {};
  if constexpr (kAhead) next.load(a, begin);
  for (int64_t t = begin; t < end; ++t) {
    if constexpr (kAhead) {
      row = next;
      if (t + 1 < end) next.load(a, t + 1);
    } else {
      row.load(a, t);
    }
    float dot = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        dot += to_float(row.dy[p].at[j]) * to_float(weight[p].at[j]) * to_float(row.x[p].at[j]);
    }
    const float shift = a.shift_of(row_sum(dot, shared[t % 2]), row.rstd);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t d = int64_t{threadIdx.x + p * blockDim.x} * kSize;
      if (d >= a.columns) break;
      P dx;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float dy = to_float(row.dy[p].at[j]), x = to_float(row.x[p].at[j]);
        dweight[p].at[j] += dy * (x * row.rstd);
        const float dsum = row.rstd * (dy * to_float(weight[p].at[j]) - x * shift);
        dx.at[j] = from_float<F>(a.dresidual ? to_float(row.dresidual[p].at[j]) + dsum : dsum);
      }
      dx.store(a.dx + t * a.dx_stride + d);
    }
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t d = int64_t{threadIdx.x + p * blockDim.x} * kSize;
    if (d < a.columns) dweight[p].store(a.dweight_PD + blockIdx.x * a.columns + d);
  }
}

template <class F>
__global__ void __launch_bounds__(kLoopThreads)
    rms_norm_backward_loop_kernel(const NormBackward<F> a) {
  __shared__ float shared[2][32];
  const int64_t begin = blockIdx.x * a.rows_of_part, end = min(a.tokens, begin + a.rows_of_part);
  float* const dweight = a.dweight_PD + blockIdx.x * a.columns;
  for (int64_t t = begin; t < end; ++t) {
    const F* const dy = a.dy + t * a.dy_stride;
    const F* const x = a.x + t * a.x_stride;
    float dot = 0;
    for (int64_t d = threadIdx.x; d < a.columns; d += kLoopThreads)
      dot += to_float(dy[d]) * to_float(a.weight[d]) * to_float(x[d]);
    const float rstd = a.rstd[t], shift = a.shift_of(row_sum(dot, shared[t % 2]), rstd);
    for (int64_t d = threadIdx.x; d < a.columns; d += kLoopThreads) {
      const float g = to_float(dy[d]) * to_float(a.weight[d]), s = to_float(x[d]) * rstd;
      dweight[d] = (t == begin ? 0.0f : dweight[d]) + to_float(dy[d]) * s;
      float dx = rstd * (g - to_float(x[d]) * shift);
      if (a.dresidual) dx += to_float(a.dresidual[t * a.dresidual_stride + d]);
      a.dx[t * a.dx_stride + d] = from_float<F>(dx);
    }
  }
}

// Calls with_packs.operator()<kPacks>(threads) for rows of n vectors, or `loop` where they do not
// fit.
template <class WithPacks, class Loop>
void dispatch_packs(int64_t n, int64_t most_of_one, int64_t most_of_two,
                    const WithPacks& with_packs, const Loop& loop) {
  const auto threads = [n](int64_t packs) {
    return static_cast<unsigned>(ceil_div(ceil_div(n, packs), 32) * 32);
  };
  if (n > 4 * kMostThreads) return loop();
  if (n <= most_of_one) return with_packs.template operator()<1>(threads(1));
  if (n <= most_of_two) return with_packs.template operator()<2>(threads(2));
  with_packs.template operator()<4>(threads(4));
}

template <class F>
bool rows_fit_vectors(const Tensor& x) {
  if (!x.defined()) return true;
  const int64_t columns = x.size(x.dims() - 1);
  return fits_vectors<F>(x.raw(), columns, x.dims() == 1 ? columns : x.row_stride());
}

// The cut of the rows for dweight. 512 parts are all under way at once on an H100, and their sums
// are a fiftieth of the traffic at 16384 rows. Short rows need more of them.
struct Parts {
  int64_t rows, count;

  Parts(int64_t tokens, int64_t columns)
      : rows(std::max<int64_t>(8, ceil_div(tokens, columns < 1024 ? 1024 : 512))),
        count(ceil_div(tokens, rows)) {}
};

int64_t backward_scratch(const Tensor& x_TD) {
  const int64_t T = x_TD.size(0), D = x_TD.size(1);
  return ScratchPieces::padded(Parts(T, D).count * D * static_cast<int64_t>(sizeof(float)));
}

template <class F>
void launch_norm(const Norm<F>& norm, bool vectors, cudaStream_t stream) {
  const auto loop = [&] {
    add_rms_norm_loop_kernel<F>
        <<<static_cast<unsigned>(norm.tokens), kLoopThreads, 0, stream>>>(norm);
  };
  if (!vectors) return loop();
  dispatch_packs(
      norm.columns / kVector<F>, 32, 512,
      [&]<int kPacks>(unsigned threads) {
        const unsigned rows = threads == 32 ? kRowsOfWarps : 1;
        const auto blocks = static_cast<unsigned>(ceil_div(norm.tokens, rows));
        add_rms_norm_kernel<F, kPacks><<<blocks, dim3(threads, rows), 0, stream>>>(norm);
      },
      loop);
}

template <class F>
void launch_backward(const NormBackward<F>& norm, bool vectors, int64_t parts,
                     cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(parts);
  const auto loop = [&] {
    rms_norm_backward_loop_kernel<F><<<blocks, kLoopThreads, 0, stream>>>(norm);
  };
  if (!vectors) return loop();
  dispatch_packs(
      norm.columns / kVector<F>, kMostThreads, 2 * kMostThreads,
      [&]<int kPacks>(unsigned threads) {
        rms_norm_backward_kernel<F, kPacks><<<blocks, threads, 0, stream>>>(norm);
      },
      loop);
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

void CudaOps::rms_norm_backward(Stream& stream, const Tensor& dy_TD, const Tensor& x_TD,
                                const Tensor& weight_D, const Tensor& rstd_T,
                                const Tensor& dresidual_TD, Accumulate accumulate,
                                const Tensor& dx_TD, const Tensor& dweight_D) {
  const DType dtype = x_TD.dtype();
  DSTRAIN_CHECK(x_TD.dims() == 2, "rms_norm_backward: x_TD is " + x_TD.describe());
  const int64_t T = x_TD.size(0), D = x_TD.size(1);
  expect_strided(dy_TD, "rms_norm_backward: dy_TD", dtype, {T, D});
  expect(weight_D, "rms_norm_backward: weight_D", dtype, {D});
  expect(rstd_T, "rms_norm_backward: rstd_T", DType::f32, {T});
  expect_strided(dx_TD, "rms_norm_backward: dx_TD", dtype, {T, D});
  expect(dweight_D, "rms_norm_backward: dweight_D", DType::f32, {D});
  if (dresidual_TD.defined())
    expect_strided(dresidual_TD, "rms_norm_backward: dresidual_TD", dtype, {T, D});
  if (D == 0) return;
  const Parts parts(T, D);
  float* const dweight_PD =
      ScratchPieces(stream, backward_scratch(x_TD)).take<float>(parts.count * D);
  if (T > 0) {
    dispatch_f(dtype, "rms_norm_backward", [&]<class F>() {
      const NormBackward<F> norm{.dy = pointer<F>(dy_TD),
                                 .x = pointer<F>(x_TD),
                                 .weight = pointer<F>(weight_D),
                                 .rstd = pointer<float>(rstd_T),
                                 .dresidual = pointer<F>(dresidual_TD),
                                 .dx = pointer<F>(dx_TD),
                                 .dweight_PD = dweight_PD,
                                 .dy_stride = dy_TD.row_stride(),
                                 .x_stride = x_TD.row_stride(),
                                 .dresidual_stride = dresidual_TD.row_stride(),
                                 .dx_stride = dx_TD.row_stride(),
                                 .tokens = T,
                                 .columns = D,
                                 .rows_of_part = parts.rows};
      const bool vectors = rows_fit_vectors<F>(dy_TD) && rows_fit_vectors<F>(x_TD) &&
                           rows_fit_vectors<F>(weight_D) && rows_fit_vectors<F>(dresidual_TD) &&
                           rows_fit_vectors<F>(dx_TD);
      launch_backward(norm, vectors, parts.count, cuda(stream));
    });
    check_launch("rms_norm_backward");
  }
  sum_parts(stream, dweight_PD, parts.count, D, accumulate, pointer<float>(dweight_D));
}

void PlanningOps::rms_norm_backward(Stream&, const Tensor&, const Tensor& x_TD, const Tensor&,
                                    const Tensor&, const Tensor&, Accumulate, const Tensor&,
                                    const Tensor&) {
  note(backward_scratch(x_TD));
}

}  // namespace dstrain
