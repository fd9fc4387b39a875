// Root-mean-square normalisation fused with the residual addition before it, and its gradient
// (formulas: core/backend/cpu_ops_norm.cpp). T tokens, D columns. sum is rounded to F before its
// statistics are taken; all arithmetic is f32. A row of up to 2048 vectors of 16 bytes stays in
// registers, so that each operand is moved once; longer or unaligned rows are read twice.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/pack.cuh"
#include "cuda/partial_sums.h"
#include "cuda/planning_ops.h"

namespace dstrain {
namespace {

constexpr int kLoopThreads = 256;
constexpr int64_t kMostVectors = 2048;      // of a row in registers
constexpr int64_t kVectorsOfOneWarp = 256;  // of a row
constexpr int kForwardRows = 4;             // rows of a block where a row has one warp
constexpr int64_t kMultiprocessors = 132;   // of an H100; a constant, for results by shape only

// A thread with `packs` vectors of each operand may have 32 * packs registers, so that this many
// threads share a multiprocessor.
constexpr int threads_together(int packs) {
  return 2048 / packs;
}

// Rows of a block of the backward pass where a row has one warp: two blocks share a multiprocessor.
constexpr int backward_rows(int packs) {
  return threads_together(packs) / 32 / 2;
}

// The sum over the threads of a row: whole warps. Several have one barrier, so that `shared` may be
// used again only after another one.
__device__ __forceinline__ float row_sum(float x, int threads, float* shared) {
  x = warp_sum(x);
  if (threads == 32) return x;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < threads / 32 ? shared[threadIdx.x % 32] : 0.0f);
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

// The vectors of one row that a thread has, threads() apart; zero where the row has ended. They
// stay as they were loaded, and elements are taken out where they are used: kept as elements, each
// bf16 would have a register, and loads would be waited for early.
template <class F, int kPacks>
struct RowPacks {
  static constexpr int kOfWord = 4 / sizeof(F);  // elements
  static constexpr int kWords = 4 * kPacks;
  static constexpr int kSize = kVector<F>;

  Pack<uint32_t, 4> pack[kPacks];

  // Of a row. RowShape gives 4 packs alone to several warps: the others compile to fixed offsets.
  __device__ static int threads() { return kPacks == 4 ? static_cast<int>(blockDim.x) : 32; }
  __device__ static int column(int p) {
    return (static_cast<int>(threadIdx.x) + p * threads()) * kSize;
  }

  __device__ __forceinline__ static RowPacks load(const F* row, int columns) {
    RowPacks out = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (column(p) < columns)
        out.pack[p] = Pack<uint32_t, 4>::load(reinterpret_cast<const uint32_t*>(row + column(p)));
    return out;
  }
  // Leaves the first-level cache to the weight.
  __device__ __forceinline__ static RowPacks stream(const F* row, int columns) {
    RowPacks out = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (column(p) < columns)
        out.pack[p] = Pack<uint32_t, 4>::stream(reinterpret_cast<const uint32_t*>(row + column(p)));
    return out;
  }
  __device__ __forceinline__ void store(F* row, int columns) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (column(p) < columns) pack[p].store(reinterpret_cast<uint32_t*>(row + column(p)));
  }
  __device__ __forceinline__ uint32_t& word(int w) {
    return pack[w / 4].at[w % 4];
  }
  __device__ __forceinline__ Pack<float, kOfWord> get(int w) const {
    return unpacked<F>(pack[w / 4].at[w % 4]);
  }
  // Elements that were taken out before are not kept for later uses.
  __device__ __forceinline__ void forget_elements() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) asm volatile("" : "+r"(word(w)));
  }
};

// blockDim.x threads for a row, blockDim.y rows (1 unless a row has one warp). The weight is read
// late: its place in registers is that of delta.
template <class F, int kPacks>
__global__ void __launch_bounds__(threads_together(kPacks)) add_rms_norm_kernel(const Norm<F> a) {
  using Row = RowPacks<F, kPacks>;
  using Elements = Pack<float, Row::kOfWord>;
  __shared__ float shared[32];
  const int columns = static_cast<int>(a.columns);
  const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (t >= a.tokens) return;
  Row x = Row::stream(a.x + t * a.x_stride, columns);
  // Without a branch, so that all loads are on their way together.
  const Row delta = Row::stream(a.delta + t * a.delta_stride, a.delta ? columns : 0);
  if (a.delta) {
#pragma unroll
    for (int w = 0; w < Row::kWords; ++w) {
      Elements sum = x.get(w);
#pragma unroll
      for (int j = 0; j < Row::kOfWord; ++j) sum.at[j] += delta.get(w).at[j];
      x.word(w) = packed<F>(sum);
    }
  }
  if (a.sum) x.store(a.sum + t * a.sum_stride, columns);
  const Row weight = Row::load(a.weight, columns);
  float squares = 0;
#pragma unroll
  for (int w = 0; w < Row::kWords; ++w)
#pragma unroll
    for (int j = 0; j < Row::kOfWord; ++j) squares += x.get(w).at[j] * x.get(w).at[j];
  const float rstd = a.rstd_of(row_sum(squares, Row::threads(), shared));
  if (threadIdx.x == 0) a.rstd[t] = rstd;
  x.forget_elements();
#pragma unroll
  for (int w = 0; w < Row::kWords; ++w) {
    Elements y = x.get(w);
#pragma unroll
    for (int j = 0; j < Row::kOfWord; ++j) y.at[j] = y.at[j] * rstd * weight.get(w).at[j];
    x.word(w) = packed<F>(y);
  }
  x.store(a.y + t * a.y_stride, columns);
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
  const float rstd = a.rstd_of(row_sum(squares, kLoopThreads, shared));
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
  float* dweight_PD;  // the sum of each block's rows
  int64_t dy_stride, x_stride, dresidual_stride, dx_stride;
  int64_t tokens, columns;

  // What the mean takes off g, as a factor of x.
  __device__ float shift_of(float dot, float rstd_t) const {
    return dot * rstd_t * rstd_t / static_cast<float>(columns);
  }
};

// The sum of a block's dweight over its rows, in their order.
template <class F, int kPacks>
__device__ __forceinline__ void store_dweight(const Pack<float, kVector<F>> (&dweight)[kPacks],
                                              float* out_D, int columns) {
  using Row = RowPacks<F, kPacks>;
  __shared__ float sums[backward_rows(kPacks)][kPacks * 32 * Row::kSize];
  if (blockDim.y == 1) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (Row::column(p) < columns) dweight[p].store(out_D + Row::column(p));
    return;
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int j = 0; j < Row::kSize; ++j) sums[threadIdx.y][Row::column(p) + j] = dweight[p].at[j];
  __syncthreads();
  for (int d = threadIdx.y * 32 + threadIdx.x; d < columns; d += backward_rows(kPacks) * 32) {
    float sum = 0;
#pragma unroll
    for (int row = 0; row < backward_rows(kPacks); ++row) sum += sums[row][d];
    out_D[d] = sum;
  }
}

// As above, but the blocks go over the rows together, so that what is under way lies close together
// in memory. A warp keeps dweight in registers over its rows.
template <class F, int kPacks>
__global__ void __launch_bounds__(threads_together(kPacks))
    rms_norm_backward_kernel(const NormBackward<F> a) {
  using Row = RowPacks<F, kPacks>;
  using Elements = Pack<float, Row::kOfWord>;
  __shared__ float shared[2][32];
  const int columns = static_cast<int>(a.columns);
  Row weight = Row::load(a.weight, columns);
  Pack<float, Row::kSize> dweight[kPacks] = {};
  bool odd = false;
  for (int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; t < a.tokens;
       t += int64_t{gridDim.x} * blockDim.y, odd = !odd) {
    Row dy = Row::stream(a.dy + t * a.dy_stride, columns);
    Row x = Row::stream(a.x + t * a.x_stride, columns);
    Row dx = Row::stream(a.dresidual + t * a.dresidual_stride, a.dresidual ? columns : 0);
    const float rstd = a.rstd[t];
    float dot = 0;
#pragma unroll
    for (int w = 0; w < Row::kWords; ++w)
#pragma unroll
      for (int j = 0; j < Row::kOfWord; ++j)
        dot += dy.get(w).at[j] * weight.get(w).at[j] * x.get(w).at[j];
    const float shift = a.shift_of(row_sum(dot, Row::threads(), shared[odd]), rstd);
    dy.forget_elements();
    x.forget_elements();
    weight.forget_elements();
#pragma unroll
    for (int w = 0; w < Row::kWords; ++w) {
      const Elements dy_w = dy.get(w), x_w = x.get(w), weight_w = weight.get(w);
      Elements dx_w = dx.get(w);
#pragma unroll
      for (int j = 0; j < Row::kOfWord; ++j) {
        dweight[w / 4].at[w % 4 * Row::kOfWord + j] += dy_w.at[j] * (x_w.at[j] * rstd);
        dx_w.at[j] += rstd * (dy_w.at[j] * weight_w.at[j] - x_w.at[j] * shift);
      }
      dx.word(w) = packed<F>(dx_w);
    }
    dx.store(a.dx + t * a.dx_stride, columns);
  }
  store_dweight<F, kPacks>(dweight, a.dweight_PD + blockIdx.x * a.columns, columns);
}

template <class F>
__global__ void __launch_bounds__(kLoopThreads)
    rms_norm_backward_loop_kernel(const NormBackward<F> a) {
  __shared__ float shared[2][32];
  float* const dweight = a.dweight_PD + blockIdx.x * a.columns;
  bool odd = false;
  for (int64_t t = blockIdx.x; t < a.tokens; t += gridDim.x, odd = !odd) {
    const F* const dy = a.dy + t * a.dy_stride;
    const F* const x = a.x + t * a.x_stride;
    float dot = 0;
    for (int64_t d = threadIdx.x; d < a.columns; d += kLoopThreads)
      dot += to_float(dy[d]) * to_float(a.weight[d]) * to_float(x[d]);
    const float rstd = a.rstd[t];
    const float shift = a.shift_of(row_sum(dot, kLoopThreads, shared[odd]), rstd);
    for (int64_t d = threadIdx.x; d < a.columns; d += kLoopThreads) {
      const float g = to_float(dy[d]) * to_float(a.weight[d]), s = to_float(x[d]) * rstd;
      dweight[d] = (t == blockIdx.x ? 0.0f : dweight[d]) + to_float(dy[d]) * s;
      float dx = rstd * (g - to_float(x[d]) * shift);
      if (a.dresidual) dx += to_float(a.dresidual[t * a.dresidual_stride + d]);
      a.dx[t * a.dx_stride + d] = from_float<F>(dx);
    }
  }
}

// Threads of a row, and vectors of a thread, for rows of n vectors.
struct RowShape {
  int packs;
  int64_t threads;
  bool one_warp;

  explicit RowShape(int64_t n)
      : packs(n <= 64                             ? 2
              : n <= 128 || n > kVectorsOfOneWarp ? 4
                                                  : 8),
        threads(n <= kVectorsOfOneWarp ? 32 : ceil_div(n, 4 * 32) * 32),
        one_warp(threads == 32) {}
};

// Calls f.operator()<kPacks>().
template <class Function>
void dispatch_packs(const RowShape& row, const Function& f) {
  if (row.packs == 2) return f.template operator()<2>();
  if (row.packs == 4) return f.template operator()<4>();
  f.template operator()<8>();
}

template <class F>
bool rows_fit_vectors(const Tensor& x) {
  return !x.defined() || fits_vectors<F>(x.raw(), x.size(x.dims() - 1), x.row_stride());
}

int64_t vectors_of_row(DType dtype, int64_t columns) {
  return ceil_div(columns * dtype_bytes(dtype), 16);
}

// Blocks of the backward pass, each with one part of dweight: as many as an H100 runs at a time,
// so that all rows are one wave and the parts are few.
int64_t backward_blocks(const Tensor& x_TD) {
  const RowShape row(vectors_of_row(x_TD.dtype(), x_TD.size(1)));
  const int64_t rows = row.one_warp ? backward_rows(row.packs) : 1;
  const int64_t together = threads_together(row.packs) / (row.threads * rows);
  return std::min(ceil_div(x_TD.size(0), rows), kMultiprocessors * std::max<int64_t>(1, together));
}

int64_t backward_scratch(const Tensor& x_TD) {
  return ScratchPieces::padded(backward_blocks(x_TD) * x_TD.size(1) *
                               static_cast<int64_t>(sizeof(float)));
}

template <class F>
void launch_norm(const Norm<F>& norm, bool vectors, cudaStream_t stream) {
  const int64_t n = norm.columns / kVector<F>;
  if (!vectors || n > kMostVectors) {
    add_rms_norm_loop_kernel<F>
        <<<static_cast<unsigned>(norm.tokens), kLoopThreads, 0, stream>>>(norm);
    return;
  }
  const RowShape row(n);
  const int64_t rows = row.one_warp ? kForwardRows : 1;
  const auto blocks = static_cast<unsigned>(ceil_div(norm.tokens, rows));
  const dim3 threads(static_cast<unsigned>(row.threads), static_cast<unsigned>(rows));
  dispatch_packs(row, [&]<int kPacks>() {
    add_rms_norm_kernel<F, kPacks><<<blocks, threads, 0, stream>>>(norm);
  });
}

template <class F>
void launch_backward(const NormBackward<F>& norm, bool vectors, int64_t parts,
                     cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(parts);
  const int64_t n = norm.columns / kVector<F>;
  if (!vectors || n > kMostVectors) {
    rms_norm_backward_loop_kernel<F><<<blocks, kLoopThreads, 0, stream>>>(norm);
    return;
  }
  const RowShape row(n);
  dispatch_packs(row, [&]<int kPacks>() {
    const unsigned rows = row.one_warp ? backward_rows(kPacks) : 1;
    const dim3 threads(static_cast<unsigned>(row.threads), rows);
    rms_norm_backward_kernel<F, kPacks><<<blocks, threads, 0, stream>>>(norm);
  });
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
  const int64_t parts = backward_blocks(x_TD);
  float* const dweight_PD = ScratchPieces(stream, backward_scratch(x_TD)).take<float>(parts * D);
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
                                 .columns = D};
      const bool vectors = rows_fit_vectors<F>(dy_TD) && rows_fit_vectors<F>(x_TD) &&
                           rows_fit_vectors<F>(weight_D) && rows_fit_vectors<F>(dresidual_TD) &&
                           rows_fit_vectors<F>(dx_TD);
      launch_backward(norm, vectors, parts, cuda(stream));
    });
    check_launch("rms_norm_backward");
  }
  sum_parts(stream, dweight_PD, parts, D, accumulate, pointer<float>(dweight_D));
}

void PlanningOps::rms_norm_backward(Stream&, const Tensor&, const Tensor& x_TD, const Tensor&,
                                    const Tensor&, const Tensor&, Accumulate, const Tensor&,
                                    const Tensor&) {
  note(backward_scratch(x_TD));
}

}  // namespace dstrain
