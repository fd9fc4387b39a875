// Gradients of attention in tiles, after FlashAttention-2 (Dao 2023, arXiv:2307.08691). With
// s = scale q k^T and p = exp(s - lse):
//   dv = p^T do,  ds = p (do v^T - delta) scale,  delta = sum(do o),  dq = ds k,  dk = ds^T q
// dq is computed by query rows, dk and dv by key rows, which computes scores and probabilities
// twice and needs no sums over blocks. See tiled_attention.cuh.
#include "cuda/tiled_attention.h"

#include "cuda/tiled_attention.cuh"

namespace dstrain::tiles {
namespace {

constexpr int kWarpsOfDelta = 8;
constexpr int kColumnsByKeys = 32;  // there two results of a row are in registers

// delta[t,h] = sum(do o), one warp each.
template <class F>
__global__ void delta_kernel(const Heads<const F> dout, const Heads<const F> o, int64_t T, int H,
                             float* delta) {
  const int64_t i = int64_t{blockIdx.x} * kWarpsOfDelta + threadIdx.x / 32;
  if (i >= T * H) return;
  const int64_t t = i / H;
  const int h = static_cast<int>(i % H);
  const F* const x = dout.at(t, h);
  const F* const y = o.at(t, h);
  float sum = 0;
  for (int d = threadIdx.x % 32; d < o.width; d += 32)
    sum = fmaf(to_float(x[d]), to_float(y[d]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[i] = sum;
}

template <class F>
struct Backward {
  Heads<const F> q, k, v, dout;
  Heads<F> dq, dk, dv;
  const float* lse;
  const float* delta;
  SegmentsOfTiles segments;
  int64_t rows;  // T, or U by keys
  int tiles, heads, H, heads_per_group;
  int q_depth, v_depth;      // Q and W rounded up to 16
  int q_columns, v_columns;  // of the tiles: not less
  float scale;
  bool vectors;
};

// The rows that a block owns are queries (the result is dq) or keys (dk of width up to kQ, dv up to
// kW; 0 leaves one out); columns are the other side. Of both sides there is a first matrix (q, k)
// and a second one (do, v).
template <class F, bool kByKeys, int kQ, int kW, int kColumns>
__global__ void __launch_bounds__(kMostThreads, 2) attention_backward_kernel(const Backward<F> a) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int rows = static_cast<int>(blockDim.x) / 32 * kRowsOfWarp;
  const int q_stride = a.q_columns + kRowPadding<F>, v_stride = a.v_columns + kRowPadding<F>;
  F* const row_first = reinterpret_cast<F*>(shared);
  F* const row_second = row_first + rows * q_stride;
  F* const column_first = row_second + rows * v_stride;
  F* const column_second = column_first + kColumns * q_stride;
  float* const column_lse = reinterpret_cast<float*>(column_second + kColumns * v_stride);
  float* const column_delta = column_lse + kColumns;

  const int row_head = static_cast<int>(blockIdx.x) % a.heads;
  // The tiles with most work first: late queries, early keys.
  const int place = static_cast<int>(blockIdx.x) / a.heads,
            tile = kByKeys ? place : a.tiles - 1 - place;
  const int64_t block_row = int64_t{tile} * rows;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = block_row + warp * kRowsOfWarp + threadIdx.x % 32 / 4;
  load_tile(row_first, q_stride, rows, a.q_columns, kByKeys ? a.k : a.q, block_row, row_head,
            a.rows - block_row, a.vectors);
  load_tile(row_second, v_stride, rows, a.v_columns, kByKeys ? a.v : a.dout, block_row, row_head,
            a.rows - block_row, a.vectors);
  commit_copies();

  float row_lse[2], row_delta[2];
  if constexpr (!kByKeys) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool inside = row + 8 * r < a.rows;
      row_lse[r] = inside ? a.lse[(row + 8 * r) * a.H + row_head] : 0.0f;
      row_delta[r] = inside ? a.delta[(row + 8 * r) * a.H + row_head] : 0.0f;
    }
  }
  float first[kQ > 0 ? kQ / 8 : 1][4] = {}, second[kW > 0 ? kW / 8 : 1][4] = {};
  const int last = a.segments.last[tile];
  for (int n = a.segments.first[tile]; n <= last; ++n) {
    const Segment segment = a.segments[n];
    const int64_t own = kByKeys ? segment.key : segment.query;
    const int64_t begin = max(block_row, own);
    const int64_t end = min(block_row + rows, own + (kByKeys ? segment.keys : segment.queries));
    if (begin >= end) continue;
    // Of the other side, [from, to) matters to this block.
    const int shift = static_cast<int>(segment.shift), keys = static_cast<int>(segment.keys);
    const int from = kByKeys ? max(0, static_cast<int>(begin - own) - shift) : 0;
    const int to = kByKeys ? static_cast<int>(segment.queries)
                           : min(keys, shift + static_cast<int>(end - own));
    for (int member = 0; member < (kByKeys ? a.heads_per_group : 1); ++member) {
      const int column_head =
          kByKeys ? row_head * a.heads_per_group + member : row_head / a.heads_per_group;
      for (int column = from; column < to; column += kColumns) {
        const int64_t at = (kByKeys ? segment.query : segment.key) + column;
        __syncthreads();
        load_tile(column_first, q_stride, kColumns, a.q_columns, kByKeys ? a.q : a.k, at,
                  column_head, to - column, a.vectors);
        commit_copies();
        load_tile(column_second, v_stride, kColumns, a.v_columns, kByKeys ? a.dout : a.v, at,
                  column_head, to - column, a.vectors);
        commit_copies();
        if constexpr (kByKeys) {
          for (int c = static_cast<int>(threadIdx.x); c < kColumns;
               c += static_cast<int>(blockDim.x)) {
            const bool inside = column + c < to;
            column_lse[c] = inside ? a.lse[(at + c) * a.H + column_head] : 0.0f;
            column_delta[c] = inside ? a.delta[(at + c) * a.H + column_head] : 0.0f;
          }
        }
        wait_for_copies<1>();
        __syncthreads();

        // Row r of this lane meets the columns [low, high) of the tile.
        int low[2], high[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int64_t t = row + 8 * r;
          const int i = static_cast<int>(t - own);
          const bool inside = begin <= t && t < end;
          low[r] = kByKeys ? i - shift - column : 0;
          high[r] = !inside ? 0 : (kByKeys ? to : min(to, shift + i + 1)) - column;
        }
        const bool any = __any_sync(kAllLanes, max(low[0], 0) < min(high[0], kColumns) ||
                                                   max(low[1], 0) < min(high[1], kColumns));
        float p[kColumns / 8][4] = {}, ds[kColumns / 8][4] = {};
        if (any)
          add_product_nt(p, row_first + warp * kRowsOfWarp * q_stride, q_stride, column_first,
                         q_stride, a.q_depth);
        wait_for_copies<0>();
        __syncthreads();
        if (!any) continue;
        if constexpr (kQ > 0)
          add_product_nt(ds, row_second + warp * kRowsOfWarp * v_stride, v_stride, column_second,
                         v_stride, a.v_depth);
#pragma unroll
        for (int c = 0; c < kColumns / 8; ++c)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = i / 2, j = 8 * c + 2 * static_cast<int>(threadIdx.x % 4) + i % 2;
            const float lse = kByKeys ? column_lse[j] : row_lse[r];
            const float delta = kByKeys ? column_delta[j] : row_delta[r];
            p[c][i] = low[r] <= j && j < high[r] ? exponential<F>(p[c][i] * a.scale - lse) : 0.0f;
            ds[c][i] = p[c][i] * (ds[c][i] - delta) * a.scale;
          }
        if constexpr (kW > 0) add_product_nn(second, p, column_second, v_stride);
        if constexpr (kQ > 0) add_product_nn(first, ds, column_first, q_stride);
      }
    }
  }
  wait_for_copies<0>();
  if constexpr (kQ > 0) store_rows(first, kByKeys ? a.dk : a.dq, row, a.rows, row_head, a.vectors);
  if constexpr (kW > 0) store_rows(second, a.dv, row, a.rows, row_head, a.vectors);
}

// dq, or dk and dv, in results of kQ and kW columns. `tables` is memory for find_segments.
template <class F, bool kByKeys, int kQ, int kW>
void run_backward_part(Stream& stream, Backward<F> a, int64_t rows,
                       const AttentionSegments& segments, int32_t* tables) {
  constexpr int kColumns = kByKeys ? kColumnsByKeys : kTileColumns<F>;
  a.rows = rows;
  a.heads = kByKeys ? a.H / a.heads_per_group : a.H;
  a.q_depth = static_cast<int>(round_up(a.q.width, 16));
  a.v_depth = static_cast<int>(round_up(a.v.width, 16));
  a.q_columns = std::max(a.q_depth, kQ);
  a.v_columns = std::max(a.v_depth, kW);
  const int64_t row_elements = a.q_columns + a.v_columns + 2 * kRowPadding<F>;
  const int64_t row_bytes = row_elements * static_cast<int64_t>(sizeof(F));
  const int64_t column_bytes = kColumns * (row_bytes + 2 * static_cast<int64_t>(sizeof(float)));
  const int warps = warps_for(row_bytes, column_bytes), rows_of_tile = warps * kRowsOfWarp;
  a.tiles = static_cast<int>(ceil_div(rows, rows_of_tile));
  if (a.tiles == 0) return;
  a.segments = find_segments(segments, kByKeys ? Side::keys : Side::queries, rows, rows_of_tile,
                             tables, cuda(stream));
  launch(attention_backward_kernel<F, kByKeys, kQ, kW, kColumns>, a, int64_t{a.tiles} * a.heads,
         warps, rows_of_tile * row_bytes + column_bytes, cuda(stream), "attention_backward");
}

template <class F>
void run_backward(Stream& stream, const Backward<F>& a, int64_t T, int64_t U,
                  const AttentionSegments& segments, int32_t* tables) {
  const int Q = a.q.width, W = a.v.width;
  const auto by_queries = [&]<int kQ>() {
    run_backward_part<F, false, kQ, 0>(stream, a, T, segments, tables);
  };
  const auto by_keys = [&]<int kQ, int kW>() {
    run_backward_part<F, true, kQ, kW>(stream, a, U, segments, tables);
  };
  if constexpr (sizeof(F) == 2)
    dispatch_width<64, 128, 192, kMostWidth>(Q, by_queries);
  else
    dispatch_width<128, kMostWidth>(Q, by_queries);
  if (sizeof(F) == 2 && Q <= 64 && W <= 64)
    by_keys.template operator()<sizeof(F) == 2 ? 64 : 128, sizeof(F) == 2 ? 64 : 128>();
  else if (Q <= 128 && W <= 128)
    by_keys.template operator()<128, 128>();
  else if (sizeof(F) == 2 && Q <= 192 && W <= 128)
    by_keys.template operator()<sizeof(F) == 2 ? 192 : 128, 128>();
  else {  // not enough registers for both results
    by_keys.template operator()<kMostWidth, 0>();
    by_keys.template operator()<0, kMostWidth>();
  }
}

}  // namespace
}  // namespace dstrain::tiles

namespace dstrain {

void tiled_attention_backward(Stream& stream, const Tensor& do_THW, const Tensor& q_THQ,
                              const Tensor& k_UGQ, const Tensor& v_UGW, const Tensor& o_THW,
                              const Tensor& lse_TH, const AttentionSegments& segments, double scale,
                              const Tensor& dq_THQ, const Tensor& dk_UGQ, const Tensor& dv_UGW) {
  tiles::check_widths(q_THQ.size(2), v_UGW.size(2));
  const int64_t T = q_THQ.size(0), U = k_UGQ.size(0), H = q_THQ.size(1), G = k_UGQ.size(1);
  ScratchPieces scratch(stream, tiled_attention_bytes(T, U, H));
  float* const delta = scratch.take<float>(T * H);
  int32_t* const tables = scratch.take<int32_t>(2 * ceil_div(std::max(T, U), tiles::kRowsOfWarp));
  dispatch_f(q_THQ.dtype(), "attention_backward", [&]<class F>() {
    if (T > 0) {
      tiles::delta_kernel<F><<<static_cast<unsigned>(ceil_div(T * H, tiles::kWarpsOfDelta)),
                               32 * tiles::kWarpsOfDelta, 0, cuda(stream)>>>(
          tiles::Heads<const F>(do_THW), tiles::Heads<const F>(o_THW), T, static_cast<int>(H),
          delta);
      check_launch("attention's delta");
    }
    tiles::run_backward<F>(stream,
                           {.q = tiles::Heads<const F>(q_THQ),
                            .k = tiles::Heads<const F>(k_UGQ),
                            .v = tiles::Heads<const F>(v_UGW),
                            .dout = tiles::Heads<const F>(do_THW),
                            .dq = tiles::Heads<F>(dq_THQ),
                            .dk = tiles::Heads<F>(dk_UGQ),
                            .dv = tiles::Heads<F>(dv_UGW),
                            .lse = pointer<const float>(lse_TH),
                            .delta = delta,
                            .segments = {},
                            .rows = 0,
                            .tiles = 0,
                            .heads = 0,
                            .H = static_cast<int>(H),
                            .heads_per_group = static_cast<int>(H / G),
                            .q_depth = 0,
                            .v_depth = 0,
                            .q_columns = 0,
                            .v_columns = 0,
                            .scale = static_cast<float>(scale),
                            .vectors = tiles::all_fit_vectors<F>(
                                {q_THQ, k_UGQ, v_UGW, do_THW, dq_THQ, dk_UGQ, dv_UGW})},
                           T, U, segments, tables);
  });
}

}  // namespace dstrain
