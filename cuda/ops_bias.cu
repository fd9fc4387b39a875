// Bias of a linear layer and its gradient: x[t, d] += bias[d], dbias[d] (+)= sum_t dy[t, d]. T
// tokens, D columns; sums are f32. A thread has one pack of neighbouring columns and some rows.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/pack.cuh"
#include "cuda/partial_sums.h"
#include "cuda/planning_ops.h"

namespace dstrain {
namespace {

constexpr int kLanes = 32;  // packs of columns of a block
constexpr int kRows = 8;    // rows of a block at a time
constexpr int kBatch = 4;   // rows that a thread has under way

// blockIdx.x counts rows, blockIdx.y columns.
template <int kSize>
__device__ __forceinline__ int64_t first_column() {
  return (int64_t{blockIdx.y} * kLanes + threadIdx.x) * kSize;
}

template <class F, int kSize>
__global__ void __launch_bounds__(kLanes* kRows)
    add_bias_kernel(F* x_TD, int64_t stride, int64_t T, int64_t D, const F* __restrict__ bias_D) {
  using P = Pack<F, kSize>;
  const int64_t d = first_column<kSize>();
  if (d >= D) return;
  const int64_t first = int64_t{blockIdx.x} * (kRows * kBatch) + threadIdx.y;
  const P bias = P::load(bias_D + d);
  P x[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i)
    if (first + i * kRows < T) x[i] = P::load(x_TD + (first + i * kRows) * stride + d);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (first + i * kRows >= T) break;
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      x[i].at[j] = from_float<F>(to_float(x[i].at[j]) + to_float(bias.at[j]));
    x[i].store(x_TD + (first + i * kRows) * stride + d);
  }
}

// The sum over one part of the rows.
template <class F, int kSize>
__global__ void __launch_bounds__(kLanes* kRows)
    bias_backward_kernel(const F* __restrict__ dy_TD, int64_t stride, int64_t T, int64_t D,
                         int64_t rows_of_part, float* __restrict__ partial_PD) {
  using P = Pack<F, kSize>;
  __shared__ float sums[kRows][kLanes * kSize];
  const int64_t d = first_column<kSize>();
  const int64_t begin = blockIdx.x * rows_of_part, end = min(T, begin + rows_of_part);
  float sum[kSize] = {};
  if (d < D) {
    for (int64_t first = begin + threadIdx.y; first < end; first += kRows * kBatch) {
      P dy[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i * kRows < end) dy[i] = P::load(dy_TD + (first + i * kRows) * stride + d);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[j] += to_float(dy[i].at[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j) sums[threadIdx.y][threadIdx.x * kSize + j] = sum[j];
  __syncthreads();
  const int64_t block_begin = int64_t{blockIdx.y} * (kLanes * kSize);
  for (int i = threadIdx.y * kLanes + threadIdx.x; i < kLanes * kSize; i += kLanes * kRows) {
    if (block_begin + i >= D) break;
    float total = 0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) total += sums[row][i];
    partial_PD[blockIdx.x * D + block_begin + i] = total;
  }
}

// The cut of the rows of dy.
struct Parts {
  int64_t rows, count;

  explicit Parts(int64_t tokens)
      : rows(std::max<int64_t>(128, ceil_div(tokens, 256))), count(ceil_div(tokens, rows)) {}
};

int64_t backward_scratch(const Tensor& dy_TD) {
  const int64_t elements = Parts(dy_TD.size(0)).count * dy_TD.row_numel();
  return ScratchPieces::padded(elements * static_cast<int64_t>(sizeof(float)));
}

// Calls launch.operator()<kSize>(blocks over columns).
template <class F, class Launch>
void dispatch_columns(bool vectors, int64_t columns, const Launch& launch) {
  const auto blocks = [columns](int size) {
    const int64_t count = ceil_div(columns, kLanes * size);
    DSTRAIN_CHECK(count <= 65535, "a bias has " + std::to_string(columns) + " elements");
    return static_cast<unsigned>(count);
  };
  if (vectors)
    launch.template operator()<kVector<F>>(blocks(kVector<F>));
  else
    launch.template operator()<1>(blocks(1));
}

}  // namespace

void CudaOps::add_bias(Stream& stream, const Tensor& x_TD, const Tensor& bias_D) {
  const int64_t T = x_TD.size(0), D = x_TD.row_numel();
  expect(bias_D, "add_bias: bias_D", x_TD.dtype(), {D});
  if (T == 0 || D == 0) return;
  dispatch_f(x_TD.dtype(), "add_bias", [&]<class F>() {
    const bool vectors =
        fits_vectors<F>(x_TD.raw(), D, x_TD.row_stride()) && fits_vectors<F>(bias_D.raw(), D, D);
    dispatch_columns<F>(vectors, D, [&]<int kSize>(unsigned column_blocks) {
      const dim3 grid(static_cast<unsigned>(ceil_div(T, kRows * kBatch)), column_blocks);
      add_bias_kernel<F, kSize><<<grid, dim3(kLanes, kRows), 0, cuda(stream)>>>(
          pointer<F>(x_TD), x_TD.row_stride(), T, D, pointer<F>(bias_D));
    });
  });
  check_launch("add_bias");
}

void CudaOps::bias_backward(Stream& stream, const Tensor& dy_TD, Accumulate accumulate,
                            const Tensor& dbias_D) {
  const int64_t T = dy_TD.size(0), D = dy_TD.row_numel();
  expect(dbias_D, "bias_backward: dbias_D", DType::f32, {D});
  if (D == 0) return;
  const Parts parts(T);
  float* const partial_PD =
      ScratchPieces(stream, backward_scratch(dy_TD)).take<float>(parts.count * D);
  if (T > 0) {
    dispatch_f(dy_TD.dtype(), "bias_backward", [&]<class F>() {
      const bool vectors = fits_vectors<F>(dy_TD.raw(), D, dy_TD.row_stride());
      dispatch_columns<F>(vectors, D, [&]<int kSize>(unsigned column_blocks) {
        const dim3 grid(static_cast<unsigned>(parts.count), column_blocks);
        bias_backward_kernel<F, kSize><<<grid, dim3(kLanes, kRows), 0, cuda(stream)>>>(
            pointer<F>(dy_TD), dy_TD.row_stride(), T, D, parts.rows, partial_PD);
      });
    });
    check_launch("bias_backward");
  }
  sum_parts(stream, partial_PD, parts.count, D, accumulate, pointer<float>(dbias_D));
}

void PlanningOps::bias_backward(Stream&, const Tensor& dy_TD, Accumulate, const Tensor&) {
  note(backward_scratch(dy_TD));
}

}  // namespace dstrain
