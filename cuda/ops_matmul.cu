// Dense products. cuBLASLt takes those of one operand type, products of f32 with bf16 are turned
// into such (see matmul_mixed.h), and what it has no algorithm for (rows at odd addresses, k = 0) a
// plain kernel multiplies.
#include "core/backend/expect.h"
#include "cuda/cuda_matmul.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"
#include "cuda/matmul_mixed.h"
#include "cuda/planning_ops.h"

namespace dstrain {
namespace {

// --- any product: f32 arithmetic, sums in the order of k
// ------------------------------------------

constexpr int kTile = 64;   // rows and columns of c for a block
constexpr int kDepth = 16;  // of k at a time
constexpr int kSide = 16;   // kSide^2 threads of (kTile / kSide)^2 elements each
constexpr int kEach = kTile / kSide;

// Element (i, k) of an operand is at i * outer + k * inner: i counts rows or columns of c.
struct Operand {
  const void* data;
  bool is_bf16;
  int64_t outer, inner;
  int64_t size;  // of i

  __device__ float at(int64_t i, int64_t k) const {
    const int64_t index = i * outer + k * inner;
    return is_bf16 ? to_float(static_cast<const bf16*>(data)[index])
                   : static_cast<const float*>(data)[index];
  }
};

// shared[k][i] = operand(first + i, k0 + k), zero outside. Neighbouring threads read along the
// dimension that is contiguous in memory.
__device__ __forceinline__ void load_tile(const Operand& x, int64_t first, int64_t k0, int64_t K,
                                          float (*shared)[kTile + 1]) {
  for (int at = threadIdx.x; at < kTile * kDepth; at += kSide * kSide) {
    const int i = x.inner == 1 ? at / kDepth : at % kTile;
    const int k = x.inner == 1 ? at % kDepth : at / kTile;
    const bool inside = first + i < x.size && k0 + k < K;
    shared[k][i] = inside ? x.at(first + i, k0 + k) : 0.0f;
  }
}

template <class C>
__global__ void __launch_bounds__(kSide* kSide)
    matmul_kernel(Operand a, Operand b, int64_t K, float alpha, float beta, C* c,
                  int64_t c_stride) {
  __shared__ float a_tile[kDepth][kTile + 1], b_tile[kDepth][kTile + 1];
  const int64_t column_tiles = (b.size + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / column_tiles * kTile,
                first_column = blockIdx.x % column_tiles * kTile;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  float sum[kEach][kEach] = {};
  for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
    load_tile(a, first_row, k0, K, a_tile);
    load_tile(b, first_column, k0, K, b_tile);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          sum[i][j] += a_tile[k][y + i * kSide] * b_tile[k][x + j * kSide];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t row = first_row + y + i * kSide, column = first_column + x + j * kSide;
      if (row >= a.size || column >= b.size) continue;
      C& out = c[row * c_stride + column];
      const float product = K == 0 ? 0.0f : alpha * sum[i][j];
      out = from_float<C>(beta == 0 ? product : product + beta * to_float(out));
    }
  }
}

void multiply_plainly(Stream& stream, const Product& p) {
  const bool ta = p.ta == Trans::yes, tb = p.tb == Trans::yes;
  const Operand a = {p.a.data, p.a.dtype == DType::bf16, ta ? 1 : p.a.stride, ta ? p.a.stride : 1,
                     p.m};
  const Operand b = {p.b.data, p.b.dtype == DType::bf16, tb ? p.b.stride : 1, tb ? 1 : p.b.stride,
                     p.n};
  const auto tiles = static_cast<unsigned>(ceil_div(p.m, kTile) * ceil_div(p.n, kTile));
  dispatch_f(p.c.dtype, "matmul", [&]<class C>() {
    matmul_kernel<C><<<tiles, kSide * kSide, 0, cuda(stream)>>>(
        a, b, p.k, p.alpha, p.beta, static_cast<C*>(p.c.data), p.c.stride);
  });
  check_launch("matmul of any shape");
}

// --- f32 times bf16
// ---------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int kVector = 8;  // bf16 in 16 bytes

// The terms of x, the low one first; of a bf16, copies.
__device__ __forceinline__ void terms_of(float x, bf16 (&terms)[Stack::kTerms]) {
  terms[2] = __float2bfloat16(x);
  const float rest = x - __bfloat162float(terms[2]);  // exact, as is the next
  terms[1] = __float2bfloat16(rest);
  terms[0] = __float2bfloat16(rest - __bfloat162float(terms[1]));
}
__device__ __forceinline__ void terms_of(bf16 x, bf16 (&terms)[Stack::kTerms]) {
  for (bf16& term : terms) term = x;
}

// x [rows, columns] becomes three matrices, zeros beyond its rows and columns. A thread takes
// kVector columns.
template <class X>
__global__ void __launch_bounds__(kThreads)
    stack_kernel(const X* __restrict__ x, int64_t x_stride, int64_t rows, int64_t columns,
                 bool aligned, Stack stack, bf16* __restrict__ out) {
  const int64_t vectors = stack.columns / kVector, count = stack.rows * vectors;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < count;
       at += int64_t{gridDim.x} * kThreads) {
    const int64_t row = at / vectors, column = at % vectors * kVector;
    const X* const from = x + row * x_stride + column;
    alignas(16) X in[kVector];
    if (aligned && row < rows && column + kVector <= columns) {
#pragma unroll
      for (int i = 0; i < kVector; i += Vec<X>::kSize) Vec<X>::load(from + i).store(in + i);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        in[i] = row < rows && column + i < columns ? from[i] : from_float<X>(0.0f);
    }
    Vec<bf16> terms[Stack::kTerms];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      bf16 term[Stack::kTerms];
      terms_of(in[i], term);
#pragma unroll
      for (int t = 0; t < Stack::kTerms; ++t) terms[t].at[i] = term[t];
    }
#pragma unroll
    for (int t = 0; t < Stack::kTerms; ++t)
      terms[t].store(out + t * stack.step + row * stack.stride + column);
  }
}

// c = alpha * (low + middle + high) + beta * c.
template <class C>
__global__ void __launch_bounds__(kThreads)
    add_sums_kernel(const float* __restrict__ sums, Stack stack, int64_t rows, int64_t columns,
                    float alpha, float beta, C* __restrict__ c, int64_t c_stride) {
  const int64_t count = rows * columns;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < count;
       at += int64_t{gridDim.x} * kThreads) {
    const int64_t row = at / columns, column = at % columns;
    const float* const from = sums + row * stack.stride + column;
    const float product = alpha * (from[0] + from[stack.step] + from[2 * stack.step]);
    C& out = c[row * c_stride + column];
    out = from_float<C>(beta == 0 ? product : product + beta * to_float(out));
  }
}

void queue_stack(Stream& stream, const CudaDevice& device, const MatrixRef& x, int64_t rows,
                 int64_t columns, const Stack& stack, void* out) {
  if (stack.numel() == 0) return;
  const unsigned blocks =
      grid_for(stack.rows * stack.columns / kVector, kThreads, device.num_sms, 8);
  dispatch_f(x.dtype, "matmul", [&]<class X>() {
    const bool aligned = fits_vectors<X>(x.data, 0, x.stride);
    stack_kernel<X><<<blocks, kThreads, 0, cuda(stream)>>>(static_cast<const X*>(x.data), x.stride,
                                                           rows, columns, aligned, stack,
                                                           static_cast<bf16*>(out));
  });
  check_launch("matmul: three bf16 terms");
}

int64_t mixed_scratch(const MixedProduct& mixed) {
  return ScratchPieces::padded(CudaMatmul::kWorkspaceBytes) +
         ScratchPieces::padded(mixed.split_bytes()) + ScratchPieces::padded(mixed.copies_bytes()) +
         ScratchPieces::padded(mixed.sums_bytes());
}

// False, and c untouched, where cuBLASLt cannot.
bool multiply_mixed(CudaMatmul& matmul, const CudaDevice& device, Stream& stream,
                    const Product& p) {
  MixedProduct mixed(p);
  ScratchPieces pieces(stream, mixed_scratch(mixed));
  char* const workspace = pieces.take<char>(CudaMatmul::kWorkspaceBytes);
  char* const split = pieces.take<char>(mixed.split_bytes());
  char* const copies = pieces.take<char>(mixed.copies_bytes());
  char* const sums = pieces.take<char>(mixed.sums_bytes());
  mixed.place(split, copies, sums);
  queue_stack(stream, device, mixed.a_is_split ? p.a : p.b,
              mixed.a_is_split ? rows_of_a(p) : rows_of_b(p),
              mixed.a_is_split ? columns_of_a(p) : columns_of_b(p), mixed.split, split);
  queue_stack(stream, device, mixed.a_is_split ? p.b : p.a,
              mixed.a_is_split ? rows_of_b(p) : rows_of_a(p),
              mixed.a_is_split ? columns_of_b(p) : columns_of_a(p), mixed.copies, copies);
  if (!matmul.run(cuda(stream), mixed.product, workspace)) return false;
  if (mixed.along_k) return true;
  const unsigned blocks = grid_for(p.m * p.n, kThreads, device.num_sms, 8);
  dispatch_f(p.c.dtype, "matmul", [&]<class C>() {
    add_sums_kernel<C><<<blocks, kThreads, 0, cuda(stream)>>>(
        reinterpret_cast<const float*>(sums), mixed.sums, p.m, p.n, p.alpha, p.beta,
        static_cast<C*>(p.c.data), p.c.stride);
  });
  check_launch("matmul: sum of three products");
  return true;
}

// --- what the operations take
// -------------------------------------------------------------------------

// The rows of x. The stride of a single row means nothing; one that keeps it aligned is put in its
// place.
MatrixRef matrix_of(const Tensor& x, int64_t rows, int64_t columns, const char* name) {
  DSTRAIN_CHECK(x.dtype() == DType::f32 || x.dtype() == DType::bf16,
                std::string(name) + ": the CUDA back end computes in f32 and bf16, not in " +
                    dtype_name(x.dtype()));
  expect_strided(x, name, x.dtype(), {rows, columns});
  return {x.raw(), x.dtype(), rows > 1 ? x.row_stride() : ceil_div(columns, 8) * 8};
}

Product product_of(Trans ta, Trans tb, double alpha, const Tensor& a, const Tensor& b, double beta,
                   const Tensor& c) {
  DSTRAIN_CHECK(a.dims() == 2 && b.dims() == 2 && c.dims() == 2, "matmul takes three matrices");
  Product p;
  p.ta = ta;
  p.tb = tb;
  p.m = c.size(0);
  p.n = c.size(1);
  p.k = a.size(ta == Trans::yes ? 0 : 1);
  p.alpha = static_cast<float>(alpha);
  p.beta = static_cast<float>(beta);
  p.a = matrix_of(a, rows_of_a(p), columns_of_a(p), "matmul: a");
  p.b = matrix_of(b, rows_of_b(p), columns_of_b(p), "matmul: b");
  p.c = matrix_of(c, p.m, p.n, "matmul: c");
  DSTRAIN_CHECK(p.c.dtype == DType::f32 || p.a.dtype == DType::bf16 || p.b.dtype == DType::bf16,
                "matmul: the product of two f32 matrices is f32");
  return p;
}

bool is_mixed(const Product& p) {
  return p.a.dtype != p.b.dtype;
}

}  // namespace

void CudaOps::matmul(Stream& stream, Trans ta, Trans tb, double alpha, const Tensor& a,
                     const Tensor& b, double beta, const Tensor& c) {
  const Product p = product_of(ta, tb, alpha, a, b, beta, c);
  if (p.m == 0 || p.n == 0) return;
  const bool queued =
      p.k > 0 &&
      (is_mixed(p) ? multiply_mixed(*matmul_, device_, stream, p)
                   : matmul_->run(cuda(stream), p,
                                  cuda_stream(stream).scratch(CudaMatmul::kWorkspaceBytes)));
  if (!queued) multiply_plainly(stream, p);
}

void PlanningOps::matmul(Stream&, Trans ta, Trans tb, double alpha, const Tensor& a,
                         const Tensor& b, double beta, const Tensor& c) {
  const Product p = product_of(ta, tb, alpha, a, b, beta, c);
  if (p.m == 0 || p.n == 0 || p.k == 0) return;
  note(CudaMatmul::kWorkspaceBytes);
  if (!is_mixed(p)) return ops_.matmul_->plan(p);
  MixedProduct mixed(p);
  note(mixed_scratch(mixed));
  mixed.place(nullptr, nullptr, nullptr);
  ops_.matmul_->plan(mixed.product);
}

}  // namespace dstrain
