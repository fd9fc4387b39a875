// Attention in tiles of queries by keys, with the softmax normalised at the end
// (FlashAttention-2, Dao 2023, arXiv:2307.08691). With s = scale q k^T and p = exp(s - lse):
//   o = p v,  dv = p^T do,  ds = p (do v^T - delta) scale,  delta = sum(do o)
//   dq = ds k,  dk = ds^T q
// Legend: T query rows, U key rows, H query heads, G key/value heads, Q and W head widths.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "core/backend/cpu_gemm.h"
#include "core/backend/cpu_ops.h"
#include "core/backend/cpu_segments.h"
#include "core/backend/simd_math.h"

namespace dstrain {
namespace {

constexpr int64_t kQueries = QueryBlocks::kRows;
constexpr int64_t kKeys = 512;       // of a tile: two tiles stay in the second-level cache
constexpr int64_t kOwnedKeys = 256;  // rows of dk and dv in one task when heads alone are too few

// One head of a [rows, heads, width] tensor is a matrix whose rows are `stride` apart.
template <class F>
struct Heads {
  F* data;
  int64_t stride, width;

  explicit Heads(const Tensor& x) : data(x.data<F>()), stride(x.row_stride()), width(x.size(2)) {}
  F* at(int64_t row, int64_t head) const { return data + row * stride + head * width; }
};

template <class F>
F largest(const F* x, int64_t n) {
  F result = x[0];
#pragma omp simd reduction(max : result)
  for (int64_t j = 0; j < n; ++j) result = x[j] > result ? x[j] : result;
  return result;
}

template <class F>
F exp_and_sum(F* x, int64_t n, F offset) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    x[j] = fast_exp(x[j] - offset);
    sum += x[j];
  }
  return sum;
}

template <class F>
F dot(const F* x, const F* y, int64_t n) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
  return sum;
}

template <class F>
void scale_row(F* x, int64_t n, F factor) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] *= factor;
}

template <class F>
struct Forward {
  Heads<F> q, k, v, o;
  F* lse;
  int64_t H, heads_per_group;
  F scale;

  // Softmax statistics of a block's rows while keys stream by.
  struct Running {
    F max[kQueries], sum[kQueries];
  };

  void block(const QueryBlocks::Block& b, int64_t h, F* scores) const {
    const int64_t query = b.segment.query + b.first, g = h / heads_per_group, keys = b.keys();
    Running running;
    for (int64_t k0 = 0; k0 < keys; k0 += kKeys) {
      const int64_t n = std::min(kKeys, keys - k0), key = b.segment.key + k0;
      gemm(Trans::no, Trans::yes, b.rows, n, q.width, scale, q.at(query, h), q.stride, k.at(key, g),
           k.stride, F(0), scores, n);
      for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t visible = std::clamp<int64_t>(b.segment.visible(b.first + r) - k0, 0, n);
        softmax_row(scores + r * n, visible, n, k0 == 0, o.at(query + r, h), running.max[r],
                    running.sum[r]);
      }
      gemm(Trans::no, Trans::no, b.rows, v.width, n, F(1), scores, n, v.at(key, g), v.stride,
           k0 == 0 ? F(0) : F(1), o.at(query, h), o.stride);
    }
    for (int64_t r = 0; r < b.rows; ++r) {
      scale_row(o.at(query + r, h), o.width, F(1) / running.sum[r]);
      lse[(query + r) * H + h] = running.max[r] + std::log(running.sum[r]);
    }
  }

 private:
  // Scores become exp(score - max); what was summed under a smaller maximum is scaled down.
  void softmax_row(F* scores, int64_t visible, int64_t n, bool first, F* o_row, F& max,
                   F& sum) const {
    if (visible > 0) {
      const F tile_max = largest(scores, visible);
      const F new_max = first || tile_max > max ? tile_max : max;
      const F tile_sum = exp_and_sum(scores, visible, new_max);
      if (first) {
        sum = tile_sum;
      } else {
        const F factor = fast_exp(max - new_max);
        sum = sum * factor + tile_sum;
        if (factor != F(1)) scale_row(o_row, o.width, factor);
      }
      max = new_max;
    }
    std::fill(scores + visible, scores + n, F(0));
  }
};

enum class Wanted { dq, dkv, all };

template <class F>
struct Backward {
  Heads<F> dout, q, k, v, o, dq, dk, dv;
  const F* lse;
  int64_t H, heads_per_group;
  F scale;

  // Keys [k_begin, k_end) of the block's segment. dq is overwritten, dk and dv are added to.
  void block(const QueryBlocks::Block& b, int64_t h, int64_t k_begin, int64_t k_end, Wanted wanted,
             F* scratch) const {
    const int64_t query = b.segment.query + b.first;
    F delta[kQueries];
    for (int64_t r = 0; r < b.rows; ++r)
      delta[r] = dot(dout.at(query + r, h), o.at(query + r, h), o.width);
    const int64_t end = std::min(k_end, b.keys());
    for (int64_t k0 = k_begin; k0 < end; k0 += kKeys)
      tile(b, h, k0, std::min(kKeys, end - k0), wanted, k0 == k_begin, delta, scratch);
  }

 private:
  void tile(const QueryBlocks::Block& b, int64_t h, int64_t k0, int64_t n, Wanted wanted,
            bool first, const F* delta, F* p) const {
    const int64_t query = b.segment.query + b.first, key = b.segment.key + k0;
    const int64_t g = h / heads_per_group;
    F* const ds = p + kQueries * kKeys;
    const F* const q_rows = q.at(query, h);
    const F* const dout_rows = dout.at(query, h);
    gemm(Trans::no, Trans::yes, b.rows, n, q.width, scale, q_rows, q.stride, k.at(key, g), k.stride,
         F(0), p, n);
    gemm(Trans::no, Trans::yes, b.rows, n, v.width, F(1), dout_rows, dout.stride, v.at(key, g),
         v.stride, F(0), ds, n);
    for (int64_t r = 0; r < b.rows; ++r) {
      const int64_t visible = std::clamp<int64_t>(b.segment.visible(b.first + r) - k0, 0, n);
      softmax_backward_row(p + r * n, ds + r * n, visible, n, lse[(query + r) * H + h], delta[r]);
    }
    if (wanted != Wanted::dq) {
      gemm(Trans::yes, Trans::no, n, v.width, b.rows, F(1), p, n, dout_rows, dout.stride, F(1),
           dv.at(key, g), dv.stride);
      gemm(Trans::yes, Trans::no, n, q.width, b.rows, F(1), ds, n, q_rows, q.stride, F(1),
           dk.at(key, g), dk.stride);
    }
    if (wanted != Wanted::dkv) {
      gemm(Trans::no, Trans::no, b.rows, q.width, n, F(1), ds, n, k.at(key, g), k.stride,
           first ? F(0) : F(1), dq.at(query, h), dq.stride);
    }
  }

  // p: scores become probabilities. ds: do v^T becomes the gradient of q k^T.
  void softmax_backward_row(F* __restrict__ p, F* __restrict__ ds, int64_t visible, int64_t n,
                            F row_lse, F delta) const {
#pragma omp simd
    for (int64_t j = 0; j < visible; ++j) {
      p[j] = fast_exp(p[j] - row_lse);
      ds[j] = p[j] * (ds[j] - delta) * scale;
    }
    std::fill(p + visible, p + n, F(0));
    std::fill(ds + visible, ds + n, F(0));
  }
};

// rows [begin, end) of one head = 0
template <class F>
void clear(const Heads<F>& x, int64_t head, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) std::fill_n(x.at(row, head), x.width, F(0));
}

// All gradients of one run of segments and one key/value head.
template <class F>
void backward_run(const Backward<F>& op, const Segments& segments, const KeyRuns& runs, int64_t run,
                  int64_t g, F* scratch) {
  clear(op.dk, g, runs.key_begin(run), runs.key_end(run));
  clear(op.dv, g, runs.key_begin(run), runs.key_end(run));
  for (int64_t n = runs.begin(run); n < runs.end(run); ++n) {
    const Segment s = segments[n];
    for (int64_t h = g * op.heads_per_group; h < (g + 1) * op.heads_per_group; ++h) {
      for (int64_t i = 0; i < s.queries; i += kQueries)
        op.block(QueryBlocks::block(s, i), h, 0, s.keys, Wanted::all, scratch);
    }
  }
}

// dk and dv of key rows [begin, end) and one key/value head, from all segments in table order.
template <class F>
void backward_keys(const Backward<F>& op, const Segments& segments, int64_t begin, int64_t end,
                   int64_t g, F* scratch) {
  clear(op.dk, g, begin, end);
  clear(op.dv, g, begin, end);
  for (int64_t n = 0; n < segments.count(); ++n) {
    const Segment s = segments[n];
    const int64_t k_begin = std::max<int64_t>(0, begin - s.key),
                  k_end = std::min(end, s.key_end()) - s.key;
    if (k_begin >= k_end) continue;
    const int64_t first_query = s.first_query(k_begin);
    for (int64_t h = g * op.heads_per_group; h < (g + 1) * op.heads_per_group; ++h) {
      for (int64_t i = first_query; i < s.queries; i += kQueries)
        op.block(QueryBlocks::block(s, i), h, k_begin, k_end, Wanted::dkv, scratch);
    }
  }
}

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                  const Tensor& lse) {
  DSTRAIN_CHECK(q.dims() == 3 && k.dims() == 3 && v.dims() == 3,
                "attention takes [rows, heads, width]");
  const int64_t T = q.size(0), H = q.size(1), G = k.size(1);
  DSTRAIN_CHECK(G > 0 && H % G == 0, "attention: query heads do not divide over key/value heads");
  expect_strided(k, "attention: k_UGQ", q.dtype(), {k.size(0), G, q.size(2)});
  expect_strided(v, "attention: v_UGW", q.dtype(), {k.size(0), G, v.size(2)});
  expect_strided(o, "attention: o_THW", q.dtype(), {T, H, v.size(2)});
  expect(lse, "attention: lse_TH", q.dtype(), {T, H});
}

// Of one row and head (Ops::merge_attention).
template <class F>
void merge_row(const F* __restrict__ part, F part_lse, F* __restrict__ out, int64_t width, F& lse) {
  const double largest = std::max(lse, part_lse);
  const double own = std::exp(lse - largest), other = std::exp(part_lse - largest),
               sum = own + other;
  const F share = static_cast<F>(other / sum);
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) out[j] += share * (part[j] - out[j]);
  lse = static_cast<F>(largest + std::log(sum));
}

void clear_rows(ThreadPool& pool, const Tensor& x) {
  const int64_t bytes = x.row_numel() * dtype_bytes(x.dtype());
  pool.run_ranges(x.size(0), rows_per_task(x.row_numel()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      std::memset(static_cast<char*>(x.raw()) + t * x.row_stride() * dtype_bytes(x.dtype()), 0,
                  static_cast<size_t>(bytes));
  });
}

}  // namespace

void CpuOps::attention(Stream&, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                       const AttentionSegments& segments, double scale, const Tensor& o_THW,
                       const Tensor& lse_TH) {
  check_shapes(q_THQ, k_UGQ, v_UGW, o_THW, lse_TH);
  const int64_t T = q_THQ.size(0), H = q_THQ.size(1), G = k_UGQ.size(1);
  const int64_t Q = q_THQ.size(2), W = v_UGW.size(2);
  const Segments table(segments, T, k_UGQ.size(0));
  if (table.queries() != T) {  // rows in no segment
    clear_rows(pool_, o_THW);
    clear_rows(pool_, lse_TH);
  }
  const QueryBlocks blocks(table, workspace_.get<int64_t>(table.count() + 1));
  const int64_t count = blocks.count();
  blocks.log(log_, H, [&](int64_t rows, int64_t keys) {
    log_->add({Trans::no, Trans::yes, rows, keys, Q});
    log_->add({Trans::no, Trans::no, rows, W, keys});
  });
  dispatch_float(q_THQ.dtype(), [&]<class F>() {
    const Forward<F> op{Heads<F>(q_THQ), Heads<F>(k_UGQ),  Heads<F>(v_UGW),
                        Heads<F>(o_THW), lse_TH.data<F>(), H,
                        H / G,           F(scale)};
    // Blocks with many keys come last in a segment; they start first, for an even end.
    pool_.run(count * H, [&](int64_t task, void* scratch) {
      op.block(blocks[count - 1 - task / H], task % H, static_cast<F*>(scratch));
    });
  });
}

void CpuOps::attention_backward(Stream&, const Tensor& do_THW, const Tensor& q_THQ,
                                const Tensor& k_UGQ, const Tensor& v_UGW, const Tensor& o_THW,
                                const Tensor& lse_TH, const AttentionSegments& segments,
                                double scale, const Tensor& dq_THQ, const Tensor& dk_UGQ,
                                const Tensor& dv_UGW) {
  check_shapes(q_THQ, k_UGQ, v_UGW, o_THW, lse_TH);
  check_shapes(dq_THQ, dk_UGQ, dv_UGW, do_THW, lse_TH);
  const int64_t T = q_THQ.size(0), U = k_UGQ.size(0), H = q_THQ.size(1), G = k_UGQ.size(1);
  const int64_t Q = q_THQ.size(2), W = v_UGW.size(2);
  const Segments table(segments, T, U);
  if (table.queries() != T) clear_rows(pool_, dq_THQ);
  if (table.count() == 0) {
    clear_rows(pool_, dk_UGQ);
    clear_rows(pool_, dv_UGW);
    return;
  }
  int64_t* const storage = workspace_.get<int64_t>(2 * (table.count() + 1));
  QueryBlocks(table, storage).log(log_, H, [&](int64_t rows, int64_t keys) {
    log_->add({Trans::no, Trans::yes, rows, keys, Q});
    log_->add({Trans::no, Trans::yes, rows, keys, W});
    log_->add({Trans::yes, Trans::no, keys, W, rows});
    log_->add({Trans::yes, Trans::no, keys, Q, rows});
    log_->add({Trans::no, Trans::no, rows, Q, keys});
  });
  const KeyRuns runs(table, U, storage);
  dispatch_float(q_THQ.dtype(), [&]<class F>() {
    const Backward<F> op{Heads<F>(do_THW),
                         Heads<F>(q_THQ),
                         Heads<F>(k_UGQ),
                         Heads<F>(v_UGW),
                         Heads<F>(o_THW),
                         Heads<F>(dq_THQ),
                         Heads<F>(dk_UGQ),
                         Heads<F>(dv_UGW),
                         lse_TH.data<F>(),
                         H,
                         H / G,
                         F(scale)};
    if (runs.balanced(G)) {
      pool_.run(runs.count() * G, [&](int64_t task, void* scratch) {
        backward_run(op, table, runs, task / G, task % G, static_cast<F*>(scratch));
      });
      return;
    }
    // Few heads and long segments: scores are computed twice, for dq by queries and for dk, dv by
    // keys.
    const QueryBlocks blocks(table, storage);
    const int64_t key_tasks = (U + kOwnedKeys - 1) / kOwnedKeys * G;
    pool_.run(key_tasks + blocks.count() * H, [&](int64_t task, void* scratch) {
      F* const memory = static_cast<F*>(scratch);
      if (task < key_tasks) {
        const int64_t begin = task / G * kOwnedKeys;
        backward_keys(op, table, begin, std::min(U, begin + kOwnedKeys), task % G, memory);
      } else {
        const QueryBlocks::Block b = blocks[(task - key_tasks) / H];
        op.block(b, (task - key_tasks) % H, 0, b.segment.keys, Wanted::dq, memory);
      }
    });
  });
}

void CpuOps::merge_attention(Stream& stream, const Tensor& part_THW, const Tensor& part_lse_TH,
                             const AttentionSegments& segments, const Tensor& o_THW,
                             const Tensor& lse_TH, const Tensor& out_THW) {
  const DType dtype = part_THW.dtype();
  const int64_t T = part_THW.size(0), H = part_THW.size(1), W = part_THW.size(2);
  expect(part_THW, "merge_attention: part_THW", dtype, {T, H, W});
  expect(part_lse_TH, "merge_attention: part_lse_TH", dtype, {T, H});
  expect(o_THW, "merge_attention: o_THW", dtype, {T, H, W});
  expect(lse_TH, "merge_attention: lse_TH", dtype, {T, H});
  expect(out_THW, "merge_attention: out_THW", dtype, {T, H, W});
  const Segments table(segments, T, std::numeric_limits<int64_t>::max());
  if (o_THW.raw() != out_THW.raw()) convert(stream, o_THW, out_THW);
  dispatch_float(dtype, [&]<class F>() {
    for (int64_t n = 0; n < table.count(); ++n) {
      const Segment segment = table[n];
      pool_.run_ranges(segment.queries * H, rows_per_task(W), [&](int64_t begin, int64_t end) {
        for (int64_t i = segment.query * H + begin; i < segment.query * H + end; ++i)
          merge_row(part_THW.data<F>() + i * W, part_lse_TH.data<F>()[i], out_THW.data<F>() + i * W,
                    W, lse_TH.data<F>()[i]);
      });
    }
  });
}

}  // namespace dstrain
