// What the forward and the backward kernels of tiled attention share: how tensors are cut into
// tiles, which segments meet a tile, and launches. A block owns rows of the tensor that it writes,
// 16 for each of its warps, wherever segments begin and end, and goes through the segments that
// meet its rows in table order, so nothing is added by two blocks.
// Legend: T query rows, U key rows, H query heads, G key/value heads, Q and W head widths.
#pragma once

#include <climits>
#include <initializer_list>
#include <string>

#include "core/backend/ops.h"
#include "cuda/warp_product.cuh"

namespace dstrain::tiles {

constexpr int kMostWarps = 4;
constexpr int kMostThreads = 32 * kMostWarps;
constexpr int kRowsOfWarp = 16;
constexpr int kMostWidth = 256;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Columns of a tile: more in bf16, whose tiles are half as large.
template <class F>
inline constexpr int kTileColumns = sizeof(F) == 2 ? 64 : 32;

// A [rows, heads, width] tensor.
template <class F>
struct Heads {
  F* data;
  int64_t stride;
  int width;

  explicit Heads(const Tensor& x)
      : data(pointer<F>(x)), stride(x.row_stride()), width(static_cast<int>(x.size(2))) {}
  __device__ F* at(int64_t row, int head) const {
    return data + row * stride + int64_t{head} * width;
  }
};

struct Segment {
  int64_t query, queries, key, keys;
  int64_t shift;  // query i sees key j if j <= shift + i
};

// The segment table and, per tile of rows, the first and the last segment that meets it (none:
// first > last).
struct SegmentsOfTiles {
  const int32_t* table;
  const int32_t* first;
  const int32_t* last;
  bool causal;

  __device__ Segment operator[](int n) const {
    const int32_t* const row = table + int64_t{4} * n;
    return {row[0], row[1], row[2], row[3], causal ? int64_t{row[3]} - row[1] : row[3]};
  }
};

// Copies `count` rows of one head to a tile of `rows` rows and `columns` columns, with zeros in the
// rest. In 16-byte words the copies are asynchronous: the caller commits them.
template <class F>
__device__ __forceinline__ void load_tile(F* tile, int tile_stride, int rows, int columns,
                                          const Heads<const F>& x, int64_t row, int head,
                                          int64_t count, bool vectors) {
  const F* const from = x.at(row, head);
  const int step = vectors ? 16 / static_cast<int>(sizeof(F)) : 1;
  const int pieces = columns / step, threads = static_cast<int>(blockDim.x);
  int r = static_cast<int>(threadIdx.x) / pieces, piece = static_cast<int>(threadIdx.x) % pieces;
  const int r_step = threads / pieces, piece_step = threads % pieces;
  while (r < rows) {
    const int c = piece * step;
    const bool inside = r < count && c < x.width;
    F* const to = tile + r * tile_stride + c;
    if (vectors)
      copy_async(to, inside ? from + r * x.stride + c : x.data, !inside);
    else
      *to = inside ? from[r * x.stride + c] : from_float<F>(0.0f);
    r += r_step;
    piece += piece_step;
    if (piece >= pieces) {
      piece -= pieces;
      ++r;
    }
  }
}

// Rows `row` and row + 8 of a warp's result, of which this lane holds pairs of columns.
template <class F, int kN>
__device__ __forceinline__ void store_rows(const float (&c)[kN][4], const Heads<F>& x, int64_t row,
                                           int64_t rows, int head, bool pairs) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= rows) return;
    F* const to = x.at(row + 8 * r, head);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int column = 8 * n + 2 * static_cast<int>(threadIdx.x % 4);
      if (column >= x.width) continue;
      struct alignas(2 * sizeof(F)) Pair {
        F low, high;
      } const pair{from_float<F>(c[n][2 * r]), from_float<F>(c[n][2 * r + 1])};
      if (pairs) {
        *reinterpret_cast<Pair*>(to + column) = pair;
      } else {
        to[column] = pair.low;
        if (column + 1 < x.width) to[column + 1] = pair.high;
      }
    }
  }
}

template <class F>
__device__ __forceinline__ float exponential(float x) {
  return sizeof(F) == 2 ? __expf(x) : expf(x);
}

inline int64_t round_up(int64_t x, int64_t step) {
  return ceil_div(x, step) * step;
}

// Warps of a block: as many as leave room for the tiles, whose bytes are those of columns and of
// one row.
int warps_for(int64_t row_bytes, int64_t column_bytes);

template <class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int warps,
            int64_t bytes, cudaStream_t stream, const char* name) {
  if (blocks == 0) return;
  DSTRAIN_CHECK(blocks <= INT_MAX, "attention: more tiles than a launch can have");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             name);
  kernel<<<static_cast<unsigned>(blocks), 32 * warps, static_cast<size_t>(bytes), stream>>>(
      arguments);
  check_launch(name);
}

enum class Side { queries = 0, keys = 2 };  // columns of the segment table

int64_t tile_table_bytes(int64_t rows);

// `memory` holds tile_table_bytes of the rows on that side.
SegmentsOfTiles find_segments(const AttentionSegments& segments, Side side, int64_t rows,
                              int rows_of_tile, int32_t* memory, cudaStream_t stream);

void check_widths(int64_t Q, int64_t W);

template <class F>
bool all_fit_vectors(std::initializer_list<Tensor> tensors) {
  for (const Tensor& x : tensors)
    if (!fits_vectors<F>(x.raw(), x.size(2), x.row_stride())) return false;
  return true;
}

// The smallest of the widths that holds `width`.
template <int kWidth, int... kWider, class Function>
void dispatch_width(int64_t width, const Function& f) {
  if constexpr (sizeof...(kWider) > 0)
    if (width > kWidth) return dispatch_width<kWider...>(width, f);
  f.template operator()<kWidth>();
}

}  // namespace dstrain::tiles
