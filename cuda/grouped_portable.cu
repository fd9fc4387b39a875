// D = A B per group, in tiles of 64 x 64. A block sums its tile over slices of 32 of the summed
// dim: while one slice is multiplied from shared memory, the next is on its way into registers.
#include <mma.h>

#include <type_traits>

#include "cuda/grouped_portable.h"
#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr int kTile = 64, kDepth = 32, kThreads = 256;
constexpr int kPiece =
    kTile * kDepth / kThreads;  // elements of an operand that a thread fetches per slice

// A matrix in memory: rows of `columns` elements. What lies at or behind `rows` or `columns` reads
// as zero.
template <class F>
struct Rows {
  const F* data;
  int64_t stride;
  const int32_t* index;  // row r is row index[r]; null: r
  int64_t rows, columns;
  bool vectors;  // 16 bytes can be read at multiples of 16 bytes

  __device__ void fetch(int64_t row, int64_t column, F (&piece)[kPiece]) const {
    const bool inside = row < rows;
    const F* const from = data + (inside && index ? int64_t{index[row]} : row) * stride + column;
    if (inside && vectors && column + kPiece <= columns) {
      constexpr int kSize = Vec<F>::kSize;
#pragma unroll
      for (int i = 0; i < kPiece; i += kSize) {
        const Vec<F> vec = Vec<F>::load(from + i);
#pragma unroll
        for (int j = 0; j < kSize; ++j) piece[i + j] = vec.at[j];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      piece[i] = inside && column + i < columns ? from[i] : from_float<F>(0.f);
  }
};

// A slice of an operand in shared memory, stored as it lies in memory: kInner says whether the
// summed dim is the inner one. Rows are padded: against bank conflicts (f32), and to what wmma asks
// for (bf16).
template <class F, bool kInner>
struct Slice {
  static constexpr bool kWide = std::is_same_v<F, float>;
  static constexpr int kRowLength = kInner ? kDepth : kTile;
  static constexpr int kStride = kRowLength + (kWide ? (kInner ? 1 : 0) : 8);
  static constexpr int kElements = (kInner ? kTile : kDepth) * kStride;

  // Where this thread's piece lies in a slice.
  __device__ static int row() { return threadIdx.x * kPiece / kRowLength; }
  __device__ static int column() { return threadIdx.x * kPiece % kRowLength; }
  __device__ static void store(const F (&piece)[kPiece], F* slice) {
    F* const to = slice + row() * kStride + column();
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) to[i] = piece[i];
    } else {
      Vec<F> vec;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) vec.at[i] = piece[i];
      vec.store(to);
    }
  }
  // Element i of the output's dim at k of the summed one.
  __device__ static F at(const F* slice, int i, int k) {
    return slice[kInner ? i * kStride + k : k * kStride + i];
  }
  // The piece of slice number `slice` of the tile that begins at `begin` of the output's dim.
  __device__ static void fetch(const Rows<F>& x, int64_t begin, int64_t slice, F (&piece)[kPiece]) {
    if constexpr (kInner)
      x.fetch(begin + row(), slice * kDepth + column(), piece);
    else
      x.fetch(slice * kDepth + row(), begin + column(), piece);
  }
};

// The sums of a tile over all threads: 16 elements each, at (row, column) = (y + 16 i, x + 16 j).
template <bool kAInner, bool kBInner>
struct PlainSums {
  float sum[4][4] = {};

  __device__ void add(const float* a, const float* b) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k) {
      float a4[4], b4[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a4[i] = Slice<float, kAInner>::at(a, y + 16 * i, k);
        b4[i] = Slice<float, kBInner>::at(b, x + 16 * i, k);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a4[i], b4[j], sum[i][j]);
    }
  }
  __device__ void store(float* tile, int stride) const {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) tile[(y + 16 * i) * stride + x + 16 * j] = sum[i][j];
  }
};

// The same on tensor cores: each of 8 warps has 16 rows and 32 columns of the tile.
template <bool kAInner, bool kBInner>
struct TensorCoreSums {
  using Sum = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
  using A = nvcuda::wmma::fragment<
      nvcuda::wmma::matrix_a, 16, 16, 16, bf16,
      std::conditional_t<kAInner, nvcuda::wmma::row_major, nvcuda::wmma::col_major>>;
  using B = nvcuda::wmma::fragment<
      nvcuda::wmma::matrix_b, 16, 16, 16, bf16,
      std::conditional_t<kBInner, nvcuda::wmma::col_major, nvcuda::wmma::row_major>>;
  Sum sum[2];

  __device__ TensorCoreSums() {
    for (Sum& s : sum) nvcuda::wmma::fill_fragment(s, 0.f);
  }
  __device__ static int row() { return threadIdx.x / 32 % 4 * 16; }
  __device__ static int column() { return threadIdx.x / 128 * 32; }
  template <class S>
  __device__ static const bf16* corner(const bf16* slice, int i, int k) {
    return &slice[S::kRowLength == kDepth ? i * S::kStride + k : k * S::kStride + i];
  }
  __device__ void add(const bf16* a, const bf16* b) {
    using SliceA = Slice<bf16, kAInner>;
    using SliceB = Slice<bf16, kBInner>;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      A fragment_a;
      nvcuda::wmma::load_matrix_sync(fragment_a, corner<SliceA>(a, row(), k), SliceA::kStride);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        B fragment_b;
        nvcuda::wmma::load_matrix_sync(fragment_b, corner<SliceB>(b, column() + 16 * j, k),
                                       SliceB::kStride);
        nvcuda::wmma::mma_sync(sum[j], fragment_a, fragment_b, sum[j]);
      }
    }
  }
  __device__ void store(float* tile, int stride) const {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      nvcuda::wmma::store_matrix_sync(tile + row() * stride + column() + 16 * j, sum[j], stride,
                                      nvcuda::wmma::mem_row_major);
  }
};

template <class Out>
struct Output {
  Out* data;
  int64_t stride, rows, columns;
  bool add;
};

// The tile of `out` at (row0, column0), summed over `depth`.
template <class F, class Out, bool kAInner, bool kBInner>
__device__ void multiply_tile(const Rows<F>& a, int64_t row0, const Rows<F>& b, int64_t column0,
                              int64_t depth, const Output<Out>& out) {
  using SliceA = Slice<F, kAInner>;
  using SliceB = Slice<F, kBInner>;
  using Sums = std::conditional_t<std::is_same_v<F, float>, PlainSums<kAInner, kBInner>,
                                  TensorCoreSums<kAInner, kBInner>>;
  constexpr int kSumStride = kTile + 4;
  constexpr int kSliceBytes = (SliceA::kElements + SliceB::kElements) * sizeof(F);
  constexpr int kSumBytes = kTile * kSumStride * sizeof(float);
  __shared__ alignas(128) char shared[kSliceBytes > kSumBytes ? kSliceBytes : kSumBytes];
  F* const shared_a = reinterpret_cast<F*>(shared);
  F* const shared_b = shared_a + SliceA::kElements;

  Sums sums;
  F piece_a[kPiece], piece_b[kPiece];
  const int64_t slices = (depth + kDepth - 1) / kDepth;
  if (slices > 0) {
    SliceA::fetch(a, row0, 0, piece_a);
    SliceB::fetch(b, column0, 0, piece_b);
  }
  for (int64_t slice = 0; slice < slices; ++slice) {
    SliceA::store(piece_a, shared_a);
    SliceB::store(piece_b, shared_b);
    __syncthreads();
    if (slice + 1 < slices) {
      SliceA::fetch(a, row0, slice + 1, piece_a);
      SliceB::fetch(b, column0, slice + 1, piece_b);
    }
    sums.add(shared_a, shared_b);
    __syncthreads();
  }

  float* const tile = reinterpret_cast<float*>(shared);
  sums.store(tile, kSumStride);
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int64_t row = row0 + i / kTile, column = column0 + i % kTile;
    if (row >= out.rows || column >= out.columns) continue;
    Out* const to = out.data + row * out.stride + column;
    const float sum = tile[i / kTile * kSumStride + i % kTile];
    *to = from_float<Out>(out.add ? to_float(*to) + sum : sum);
  }
}

// x is the operand with groups of rows, y the output: y = x W_e^T, or y = x W_e where kTransposed
// is false.
template <class F, bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    multiply_rows_kernel(const int32_t* __restrict__ offsets_E1, int64_t E, Rows<F> x,
                         const F* __restrict__ weight, int64_t weight_rows, int64_t weight_columns,
                         bool vectors, Output<F> y) {
  // Tiles begin anew in each group. A block beyond the last tile has nothing to do.
  int64_t e = 0, tile = blockIdx.x, begin = 0, end = x.rows;
  if (offsets_E1) {
    for (; e < E; ++e) {
      begin = offsets_E1[e];
      end = offsets_E1[e + 1];
      const int64_t tiles = (end - begin + kTile - 1) / kTile;
      if (tile < tiles) break;
      tile -= tiles;
    }
  }
  const int64_t row0 = begin + tile * kTile;
  if (e == E || row0 >= end) return;
  x.rows = y.rows = end;
  const Rows<F> w{weight + e * weight_rows * weight_columns,
                  weight_columns,
                  nullptr,
                  weight_rows,
                  weight_columns,
                  vectors};
  multiply_tile<F, F, true, kTransposed>(x, row0, w, int64_t{blockIdx.y} * kTile, x.columns, y);
}

// dW_e (+)= dy_e^T x_e
template <class F>
__global__ void __launch_bounds__(kThreads)
    weight_gradient_kernel(const int32_t* __restrict__ offsets_E1, Rows<F> dy, Rows<F> x,
                           float* dweight, bool add) {
  const int64_t e = blockIdx.z, O = dy.columns, I = x.columns;
  const int64_t begin = offsets_E1 ? offsets_E1[e] : 0,
                end = offsets_E1 ? offsets_E1[e + 1] : x.rows;
  if (add && begin == end) return;
  // The group's rows become rows 0 .. end - begin.
  for (Rows<F>* operand : {&dy, &x}) {
    if (operand->index)
      operand->index += begin;
    else
      operand->data += begin * operand->stride;
    operand->rows = end - begin;
  }
  multiply_tile<F, float, false, false>(dy, int64_t{blockIdx.y} * kTile, x,
                                        int64_t{blockIdx.x} * kTile, end - begin,
                                        Output<float>{dweight + e * O * I, I, O, I, add});
}

unsigned tiles(int64_t n) {
  return static_cast<unsigned>(ceil_div(n, kTile));
}

template <class F>
Rows<F> rows_of(const void* data, int64_t stride, const int32_t* index, int64_t rows,
                int64_t columns) {
  return {static_cast<const F*>(data),          stride, index, rows, columns,
          fits_vectors<F>(data, stride, stride)};
}

template <class F>
void run(cudaStream_t stream, GroupedProduct product, const GroupedLinear& l,
         const int32_t* x_index_R, const int32_t* y_index_R, bool add) {
  const Rows<F> x = rows_of<F>(l.x_RI, l.x_stride, x_index_R, l.R, l.I);
  const Rows<F> y = rows_of<F>(l.y_RO, l.y_stride, y_index_R, l.R, l.O);
  const F* const weight = static_cast<const F*>(l.weight_EOI);
  const bool vectors = fits_vectors<F>(l.weight_EOI, l.I, l.I);
  // Each group may end with a tile that is not full.
  const unsigned row_tiles = static_cast<unsigned>(ceil_div(l.R, kTile) + l.E);
  switch (product) {
    case GroupedProduct::forward: {
      const Output<F> out{static_cast<F*>(l.y_RO), l.y_stride, l.R, l.O, false};
      multiply_rows_kernel<F, true><<<dim3(row_tiles, tiles(l.O)), kThreads, 0, stream>>>(
          l.offsets_E1, l.E, x, weight, l.O, l.I, vectors, out);
      return;
    }
    case GroupedProduct::backward_input: {
      const Output<F> out{static_cast<F*>(l.x_RI), l.x_stride, l.R, l.I, false};
      multiply_rows_kernel<F, false><<<dim3(row_tiles, tiles(l.I)), kThreads, 0, stream>>>(
          l.offsets_E1, l.E, y, weight, l.O, l.I, vectors, out);
      return;
    }
    case GroupedProduct::backward_weight:
      weight_gradient_kernel<F>
          <<<dim3(tiles(l.I), tiles(l.O), static_cast<unsigned>(l.E)), kThreads, 0, stream>>>(
              l.offsets_E1, y, x, static_cast<float*>(l.weight_EOI), add);
  }
}

}  // namespace

void run_grouped_portable(Stream& stream, GroupedProduct product, DType dtype,
                          const GroupedLinear& linear, const int32_t* x_index_R,
                          const int32_t* y_index_R, Accumulate accumulate) {
  if (linear.E == 0 || linear.O == 0 || linear.I == 0) return;
  if (linear.R == 0 && product != GroupedProduct::backward_weight) return;
  dispatch_f(dtype, "grouped_matmul", [&]<class F>() {
    run<F>(cuda(stream), product, linear, x_index_R, y_index_R, accumulate == Accumulate::add);
  });
  check_launch("grouped_matmul");
}

}  // namespace dstrain
