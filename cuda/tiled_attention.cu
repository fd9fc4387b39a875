// Attention in tiles of 16 rows per warp by kKeys columns, with the softmax normalised at
// the end (FlashAttention-2, Dao 2023, arXiv:2307.08691): o = softmax(scale q k^T) v. See
// tiled_attention.cuh.
#include "cuda/tiled_attention.h"

#include "cuda/tiled_attention.cuh"

namespace dstrain::tiles {
namespace {

// One warp per segment; `side` is 0 for tiles of queries, 2 for tiles of keys.
__global__ void segments_of_tiles_kernel(const int32_t* __restrict__ table,
                                         const int32_t* __restrict__ count, bool causal, int side,
                                         int64_t rows, int rows_of_tile, int32_t* first,
                                         int32_t* last) {
  const int warps = static_cast<int>(gridDim.x * blockDim.x / 32);
  for (int n = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32); n < *count;
       n += warps) {
    const int32_t* const row = table + int64_t{4} * n;
    const int64_t begin = row[side], count_of_rows = row[side + 1];
    if (begin < 0 || row[1] < 0 || row[3] < (causal ? row[1] : 1) || begin + count_of_rows > rows)
      __trap();  // the CPU throws
    if (count_of_rows == 0) continue;
    const int64_t last_tile = (begin + count_of_rows - 1) / rows_of_tile;
    for (int64_t tile = begin / rows_of_tile + threadIdx.x % 32; tile <= last_tile; tile += 32) {
      atomicMin(first + tile, n);
      atomicMax(last + tile, n);
    }
  }
}

__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

template <class F>
struct Forward {
  Heads<const F> q, k, v;
  Heads<F> o;
  float* lse;
  SegmentsOfTiles segments;
  int64_t T;
  int tiles, H, heads_per_group;
  int depth;  // Q rounded up to 16
  float scale;
  bool vectors;
};

// The softmax of two rows while keys stream by: of what was seen, the largest score and the sum of
// exp(score - largest), of which each of the four lanes of a row has a part.
template <class F, int kN>
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // Scores become exp(score - largest); the result so far is scaled down to the new largest score.
  // Columns from visible[r] on are masked in row r.
  template <int kO>
  __device__ __forceinline__ void add(float (&s)[kN][4], const int (&visible)[2], float scale,
                                      float (&o)[kO][4]) {
    const bool whole = __all_sync(kAllLanes, visible[0] >= 8 * kN && visible[1] >= 8 * kN);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + i % 2;
        s[n][i] = whole || column < visible[i / 2] ? s[n][i] * scale : -INFINITY;
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < kN; ++n) tile_max = fmaxf(tile_max, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      const float new_max = fmaxf(largest[r], max_of_row(tile_max));
      const float base = new_max == -INFINITY ? 0.0f : new_max;  // a row that has seen no key yet
      const float factor = exponential<F>(largest[r] - base);
      largest[r] = new_max;
      float tile_sum = 0;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          s[n][i] = exponential<F>(s[n][i] - base);
          tile_sum += s[n][i];
        }
      sum[r] = sum[r] * factor + tile_sum;
#pragma unroll
      for (int n = 0; n < kO; ++n) {
        o[n][2 * r] *= factor;
        o[n][2 * r + 1] *= factor;
      }
    }
  }
};

// A block computes one head of 16 blockDim.x / 32 query rows. kW: W rounded up.
template <class F, int kW, int kKeys>
__global__ void __launch_bounds__(kMostThreads, 2) attention_kernel(const Forward<F> a) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int kVStride = kW + kRowPadding<F>;
  const int rows = static_cast<int>(blockDim.x) / 32 * kRowsOfWarp,
            stride = a.depth + kRowPadding<F>;
  F* const q_tile = reinterpret_cast<F*>(shared);
  F* const k_tile = q_tile + rows * stride;
  F* const v_tile = k_tile + kKeys * stride;

  const int h = static_cast<int>(blockIdx.x) % a.H, g = h / a.heads_per_group;
  // Rows with many keys come last in a segment, and first here.
  const int tile = a.tiles - 1 - static_cast<int>(blockIdx.x) / a.H;
  const int64_t block_row = int64_t{tile} * rows;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = block_row + warp * kRowsOfWarp + threadIdx.x % 32 / 4;

  float o[kW / 8][4] = {};
  Softmax<F, kKeys / 8> softmax;
  load_tile(q_tile, stride, rows, a.depth, a.q, block_row, h, a.T - block_row, a.vectors);
  commit_copies();
  const int last = a.segments.last[tile];
  for (int n = a.segments.first[tile]; n <= last; ++n) {
    const Segment segment = a.segments[n];
    const int64_t begin = max(block_row, segment.query);
    const int64_t end = min(block_row + rows, segment.query + segment.queries);
    if (begin >= end) continue;
    // Query row t sees shift + t keys, or all if these are less.
    const int64_t shift = segment.shift - segment.query + 1;
    const int keys = static_cast<int>(min(segment.keys, shift + end - 1));
    int visible[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t t = row + 8 * r;
      visible[r] = begin <= t && t < end ? static_cast<int>(min(segment.keys, shift + t)) : 0;
    }
    // Keys of a tile are on their way while values before them are multiplied, and values while
    // keys are.
    const auto load_keys = [&](int key) {
      load_tile(k_tile, stride, kKeys, a.depth, a.k, segment.key + key, g, keys - key, a.vectors);
      commit_copies();
    };
    load_keys(0);
    for (int key = 0; key < keys; key += kKeys) {
      __syncthreads();
      load_tile(v_tile, kVStride, kKeys, kW, a.v, segment.key + key, g, keys - key, a.vectors);
      commit_copies();
      wait_for_copies<1>();
      __syncthreads();
      const bool any = __any_sync(kAllLanes, visible[0] > 0 || visible[1] > 0);
      float s[kKeys / 8][4] = {};
      if (any)
        add_product_nt(s, q_tile + warp * kRowsOfWarp * stride, stride, k_tile, stride, a.depth);
      wait_for_copies<0>();
      __syncthreads();
      if (key + kKeys < keys) load_keys(key + kKeys);
      if (any) {
        softmax.add(s, visible, a.scale, o);
        add_product_nn(o, s, v_tile, kVStride);
      }
      visible[0] -= kKeys;
      visible[1] -= kKeys;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_of_row(softmax.sum[r]);
    const float inverse = sum > 0 ? 1.0f / sum : 0.0f;  // zeros in rows of no segment
#pragma unroll
    for (int n = 0; n < kW / 8; ++n) {
      o[n][2 * r] *= inverse;
      o[n][2 * r + 1] *= inverse;
    }
    if (threadIdx.x % 4 == 0 && row + 8 * r < a.T)
      a.lse[(row + 8 * r) * a.H + h] = sum > 0 ? softmax.largest[r] + logf(sum) : 0.0f;
  }
  store_rows(o, a.o, row, a.T, h, a.vectors);
}

template <class F>
void run_forward(Stream& stream, Forward<F> a, const AttentionSegments& segments) {
  const int64_t Q = a.q.width, W = a.v.width;
  ScratchPieces scratch(stream, tile_table_bytes(a.T));
  int32_t* const tables = scratch.take<int32_t>(2 * ceil_div(a.T, kRowsOfWarp));
  a.depth = static_cast<int>(round_up(Q, 16));
  const auto run = [&]<int kW>() {
    constexpr int64_t kSize = sizeof(F), kKeys = kTileColumns<F>, kPadding = kRowPadding<F>;
    const int64_t q_bytes = (a.depth + kPadding) * kSize, v_bytes = (kW + kPadding) * kSize;
    const int warps = warps_for(q_bytes, kKeys * (q_bytes + v_bytes)), rows = warps * kRowsOfWarp;
    a.segments = find_segments(segments, Side::queries, a.T, rows, tables, cuda(stream));
    a.tiles = static_cast<int>(ceil_div(a.T, rows));
    launch(attention_kernel<F, kW, kKeys>, a, int64_t{a.tiles} * a.H, warps,
           rows * q_bytes + kKeys * (q_bytes + v_bytes), cuda(stream), "attention");
  };
  if constexpr (sizeof(F) == 2)
    dispatch_width<64, 128, 256>(W, run);
  else
    dispatch_width<128, 256>(W, run);
}

}  // namespace

int warps_for(int64_t row_bytes, int64_t column_bytes) {
  int device = 0, most = 0;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "asking for the shared memory of a block");
  for (int warps = kMostWarps; warps > 0; warps /= 2)
    if (warps * kRowsOfWarp * row_bytes + column_bytes <= most) return warps;
  DSTRAIN_CHECK(false, "attention: heads are too wide for the shared memory of this GPU");
}

int64_t tile_table_bytes(int64_t rows) {
  return 2 * ScratchPieces::padded(4 * ceil_div(rows, kRowsOfWarp));
}

SegmentsOfTiles find_segments(const AttentionSegments& segments, Side side, int64_t rows,
                              int rows_of_tile, int32_t* memory, cudaStream_t stream) {
  const int64_t tiles = ceil_div(rows, rows_of_tile), most = segments.table_N4.size(0);
  const SegmentsOfTiles found{pointer<const int32_t>(segments.table_N4), memory, memory + tiles,
                              segments.causal};
  const auto size = static_cast<size_t>(4 * tiles);
  check_cuda(cudaMemsetAsync(memory, 0x7f, size, stream), "clearing attention's tiles");
  check_cuda(cudaMemsetAsync(memory + tiles, 0xff, size, stream), "clearing attention's tiles");
  if (most == 0) return found;
  segments_of_tiles_kernel<<<grid_for(most, 4, 132, 8), 128, 0, stream>>>(
      found.table, pointer<const int32_t>(segments.count_1), segments.causal,
      static_cast<int>(side), rows, rows_of_tile, memory, memory + tiles);
  check_launch("the segments of attention's tiles");
  return found;
}

void check_widths(int64_t Q, int64_t W) {
  DSTRAIN_CHECK(Q <= kMostWidth && W <= kMostWidth,
                "attention: heads of " + std::to_string(std::max(Q, W)) +
                    " columns; a GPU takes up to " + std::to_string(kMostWidth));
}

}  // namespace dstrain::tiles

namespace dstrain {

int64_t tiled_attention_bytes(int64_t T, int64_t U, int64_t H) {
  return tiles::tile_table_bytes(std::max(T, U)) + ScratchPieces::padded(4 * T * H);
}

void tiled_attention(Stream& stream, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                     const AttentionSegments& segments, double scale, const Tensor& o_THW,
                     const Tensor& lse_TH) {
  tiles::check_widths(q_THQ.size(2), v_UGW.size(2));
  const int64_t T = q_THQ.size(0), H = q_THQ.size(1), G = k_UGQ.size(1);
  if (T == 0) return;
  dispatch_f(q_THQ.dtype(), "attention", [&]<class F>() {
    tiles::run_forward<F>(stream,
                          {.q = tiles::Heads<const F>(q_THQ),
                           .k = tiles::Heads<const F>(k_UGQ),
                           .v = tiles::Heads<const F>(v_UGW),
                           .o = tiles::Heads<F>(o_THW),
                           .lse = pointer<float>(lse_TH),
                           .segments = {},
                           .T = T,
                           .tiles = 0,
                           .H = static_cast<int>(H),
                           .heads_per_group = static_cast<int>(H / G),
                           .depth = 0,
                           .scale = static_cast<float>(scale),
                           .vectors = tiles::all_fit_vectors<F>({q_THQ, k_UGQ, v_UGW, o_THW})},
                          segments);
  });
}

}  // namespace dstrain
