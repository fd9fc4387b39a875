// Gradient of the root-mean-square normalisation (cuda/ops_norm.cu). T tokens, D columns, x_TD the
// sum of there; with g_td = dy_td * weight_d and s_td = x_td * rstd_t:
//   dx_td = dresidual_td + rstd_t * (g_td - s_td * mean_d(g_td * s_td)),
//   dweight_d = sum_t(dy_td * s_td)
// All arithmetic is f32. Blocks go over the rows together, have rows on the way to shared memory,
// so that each operand is moved once, and keep their share of dweight in registers; sum_parts adds
// the shares. Rows of more than 2048 vectors of 16 bytes and unaligned ones are read twice.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/norm.cuh"
#include "cuda/partial_sums.h"
#include "cuda/planning_ops.h"
#include "cuda/row_ring.cuh"

namespace dstrain {
namespace {

constexpr int kRowsOfWarps = 8;         // of a block where a row has one warp
constexpr int kThreadsTogether = 1024;  // of a multiprocessor: 64 registers for each
constexpr int kMultiprocessors = 132;   // of an H100; a constant, for results by shape only

enum Operand { kDy, kX, kDresidual, kOperands };

// A row at hand and one on its way. Where a thread has more than one vector of a row, the room goes
// to other blocks, which compute while the row is on its way.
template <class F, int kPacks>
using Ring = RowRing<F, kPacks, kOperands, kPacks == 1 ? 2 : 1>;

// Blocks of kMostNormThreads that share a multiprocessor; `packs` vectors of a row a thread.
constexpr int blocks_together(int packs) {
  return packs == 4 ? 1 : kThreadsTogether / kMostNormThreads;
}

// dresidual may be dx: nothing here is __restrict__, and a thread reads what it then writes. What
// is on its way are other rows. dresidual may be null.
template <class F>
struct NormBackward {
  const F* dy;
  const F* x;
  const F* weight;
  const float* rstd;
  const F* dresidual;
  F* dx;
  float* dweight_PD;  // P blocks: the sum over the rows of each
  int64_t dy_stride, x_stride, dresidual_stride, dx_stride;
  int64_t tokens, columns;
  float per_column;  // 1 / columns

  // What the mean takes off g, as a factor of x.
  __device__ float shift_of(float dot, float rstd_t) const {
    return dot * rstd_t * rstd_t * per_column;
  }
};

// The sums over a block's rows: those of its blockDim.y groups of threads, in their order.
template <class F, int kPacks>
__device__ __forceinline__ void store_dweight(const Ring<F, kPacks>& ring,
                                              const Pack<float, kVector<F>> (&dweight)[kPacks],
                                              float* out_D, int columns) {
  if (blockDim.y == 1) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (ring.has(p)) dweight[p].store(out_D + ring.column(p));
    return;
  }
  static_assert(Ring<F, kPacks>::bytes(1) >= kPacks * kVector<F> * int{sizeof(float)},
                "sums need more room than rows");
  float* const sums = reinterpret_cast<float*>(ring.memory());
  __syncthreads();  // the ring is no longer read
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (!ring.has(p)) break;
#pragma unroll
    for (int j = 0; j < kVector<F>; ++j)
      sums[threadIdx.y * columns + ring.column(p) + j] = dweight[p].at[j];
  }
  __syncthreads();
  for (int d = static_cast<int>(threadIdx.y * 32 + threadIdx.x); d < columns;
       d += 32 * kRowsOfWarps) {
    float sum = 0;
#pragma unroll
    for (int row = 0; row < kRowsOfWarps; ++row) sum += sums[row * columns + d];
    out_D[d] = sum;
  }
}

// blockDim.x threads for a row, blockDim.y rows at a time (1 unless a row has one warp). A thread
// keeps dweight in registers over its rows.
template <class F, int kPacks>
__global__ void __launch_bounds__(kMostNormThreads, blocks_together(kPacks))
    rms_norm_backward_kernel(const NormBackward<F> a) {
  using R = Ring<F, kPacks>;
  using Vector = RowVector<F>;
  __shared__ float shared[2][32];
  const R ring(a.columns);
  const int step = static_cast<int>(gridDim.x * blockDim.y), tokens = static_cast<int>(a.tokens);
  int t = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);
  const auto fetch = [&](int stage, int row) {
    if (row < tokens) {
      ring.fetch(stage, kDy, a.dy + row * a.dy_stride);
      ring.fetch(stage, kX, a.x + row * a.x_stride);
      if (a.dresidual) ring.fetch(stage, kDresidual, a.dresidual + row * a.dresidual_stride);
    }
    commit_copies();
  };
#pragma unroll 1
  for (int stage = 0; stage < R::kStages; ++stage) fetch(stage, t + stage * step);
  float next_rstd = t < tokens ? a.rstd[t] : 0.0f;
  Vector weight[kPacks] = {};
  Pack<float, R::kSize> dweight[kPacks] = {};
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
    if (ring.has(p)) weight[p] = Vector::load(a.weight + ring.column(p));

  int stage = 0;
  bool odd = false;
  for (; t < tokens; t += step, odd = !odd) {
    const float rstd = next_rstd;
    if (t + step < tokens) next_rstd = a.rstd[t + step];
    if constexpr (kPacks > 1) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) weight[p].forget_elements();
    }
    ring.wait();
    float dot = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!ring.has(p)) break;
      const Vector dy = ring.get(stage, kDy, p), x = ring.get(stage, kX, p);
#pragma unroll
      for (int w = 0; w < Vector::kWords; ++w)
#pragma unroll
        for (int j = 0; j < Vector::kOfWord; ++j)
          dot += dy.get(w).at[j] * weight[p].get(w).at[j] * x.get(w).at[j];
    }
    const float shift = a.shift_of(row_sum(dot, shared[odd]), rstd);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!ring.has(p)) break;
      const Vector dy = ring.get(stage, kDy, p), x = ring.get(stage, kX, p);
      Vector dx = {};
      if (a.dresidual) dx = ring.get(stage, kDresidual, p);
#pragma unroll
      for (int w = 0; w < Vector::kWords; ++w) {
        const auto dy_w = dy.get(w), x_w = x.get(w), weight_w = weight[p].get(w);
        auto dx_w = dx.get(w);
#pragma unroll
        for (int j = 0; j < Vector::kOfWord; ++j) {
          dweight[p].at[w * Vector::kOfWord + j] += dy_w.at[j] * (x_w.at[j] * rstd);
          dx_w.at[j] += rstd * (dy_w.at[j] * weight_w.at[j] - x_w.at[j] * shift);
        }
        dx.set(w, dx_w);
      }
      dx.store(a.dx + t * a.dx_stride + ring.column(p));
    }
    fetch(stage, t + R::kStages * step);
    stage = stage + 1 == R::kStages ? 0 : stage + 1;
  }
  store_dweight<F, kPacks>(ring, dweight, a.dweight_PD + blockIdx.x * a.columns,
                           static_cast<int>(a.columns));
}

template <class F>
__global__ void __launch_bounds__(kNormLoopThreads)
    rms_norm_backward_loop_kernel(const NormBackward<F> a) {
  __shared__ float shared[2][32];
  float* const dweight = a.dweight_PD + blockIdx.x * a.columns;
  bool odd = false;
  for (int64_t t = blockIdx.x; t < a.tokens; t += gridDim.x, odd = !odd) {
    const F* const dy = a.dy + t * a.dy_stride;
    const F* const x = a.x + t * a.x_stride;
    float dot = 0;
    for (int64_t d = threadIdx.x; d < a.columns; d += kNormLoopThreads)
      dot += to_float(dy[d]) * to_float(a.weight[d]) * to_float(x[d]);
    const float rstd = a.rstd[t], shift = a.shift_of(row_sum(dot, shared[odd]), rstd);
    for (int64_t d = threadIdx.x; d < a.columns; d += kNormLoopThreads) {
      const float g = to_float(dy[d]) * to_float(a.weight[d]), s = to_float(x[d]) * rstd;
      dweight[d] = (t == blockIdx.x ? 0.0f : dweight[d]) + to_float(dy[d]) * s;
      float dx = rstd * (g - to_float(x[d]) * shift);
      if (a.dresidual) dx += to_float(a.dresidual[t * a.dresidual_stride + d]);
      a.dx[t * a.dx_stride + d] = from_float<F>(dx);
    }
  }
}

// Which threads a row of n vectors has, and how many blocks go over the rows: by shape only, since
// the order of the sums in dweight depends on both.
struct RowShape {
  int packs;         // vectors of a thread; 0 if they are too many
  int64_t threads;   // of a row
  int64_t rows = 1;  // of a block at a time

  explicit RowShape(int64_t n)
      : packs(n <= 64                     ? 2  // one warp
              : n <= kMostNormThreads     ? 1
              : n <= 2 * kMostNormThreads ? 2
              : n <= 4 * kMostNormThreads ? 4
                                          : 0),
        threads(packs ? ceil_div(std::max<int64_t>(1, ceil_div(n, packs)), 32) * 32
                      : kNormLoopThreads) {
    if (threads == 32) rows = kRowsOfWarps;
  }

  // As many as run at a time, and all with the same number of rows but for the last.
  int64_t blocks(int64_t tokens) const {
    const int64_t groups = ceil_div(tokens, rows);
    const int64_t together = blocks_together(packs) * kMostNormThreads / (threads * rows);
    const int64_t most = kMultiprocessors * std::max<int64_t>(1, together);
    return ceil_div(groups, std::max<int64_t>(1, ceil_div(groups, most)));
  }
};

RowShape row_shape(const Tensor& x_TD) {
  return RowShape(ceil_div(x_TD.size(1) * dtype_bytes(x_TD.dtype()), 16));
}

// Each has its own part of dweight.
int64_t backward_blocks(const Tensor& x_TD) {
  return row_shape(x_TD).blocks(x_TD.size(0));
}

int64_t backward_scratch(const Tensor& x_TD) {
  return ScratchPieces::padded(backward_blocks(x_TD) * x_TD.size(1) *
                               static_cast<int64_t>(sizeof(float)));
}

template <class F, int kPacks>
void launch_ring(const NormBackward<F>& norm, const RowShape& row, int64_t blocks,
                 cudaStream_t stream) {
  const auto kernel = rms_norm_backward_kernel<F, kPacks>;
  const int bytes = Ring<F, kPacks>::bytes(static_cast<int>(row.threads * row.rows));
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "rms_norm_backward");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             "rms_norm_backward");
  const dim3 threads(static_cast<unsigned>(row.threads), static_cast<unsigned>(row.rows));
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(bytes), stream>>>(norm);
}

template <class F>
void launch_backward(const NormBackward<F>& norm, const RowShape& row, bool vectors, int64_t blocks,
                     cudaStream_t stream) {
  DSTRAIN_CHECK(norm.tokens < int64_t{1} << 30, "rms_norm_backward: 2^30 tokens or more");
  if (!vectors || row.packs == 0) {
    rms_norm_backward_loop_kernel<F>
        <<<static_cast<unsigned>(blocks), kNormLoopThreads, 0, stream>>>(norm);
  } else if (row.packs == 1) {
    launch_ring<F, 1>(norm, row, blocks, stream);
  } else if (row.packs == 2) {
    launch_ring<F, 2>(norm, row, blocks, stream);
  } else {
    launch_ring<F, 4>(norm, row, blocks, stream);
  }
}

}  // namespace

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
  const int64_t blocks = backward_blocks(x_TD);
  float* const dweight_PD = ScratchPieces(stream, backward_scratch(x_TD)).take<float>(blocks * D);
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
                                 .per_column = 1.0f / static_cast<float>(D)};
      const bool vectors = rows_fit_vectors<F>(dy_TD) && rows_fit_vectors<F>(x_TD) &&
                           rows_fit_vectors<F>(weight_D) && rows_fit_vectors<F>(dresidual_TD) &&
                           rows_fit_vectors<F>(dx_TD);
      launch_backward(norm, row_shape(x_TD), vectors, blocks, cuda(stream));
    });
    check_launch("rms_norm_backward");
  }
  sum_parts(stream, dweight_PD, blocks, D, accumulate, pointer<float>(dweight_D));
}

void PlanningOps::rms_norm_backward(Stream&, const Tensor&, const Tensor& x_TD, const Tensor&,
                                    const Tensor&, const Tensor&, Accumulate, const Tensor&,
                                    const Tensor&) {
  note(backward_scratch(x_TD));
}

}  // namespace dstrain
