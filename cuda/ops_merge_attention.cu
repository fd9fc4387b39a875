// Attention to two sets of keys from attention to each. With d = part_lse - lse and e = exp(-|d|),
// the set of the larger log-sum-exp has the share 1 / (1 + e) of the whole, the other the rest:
//   o = own share * o + part's share * part,  lse = max(lse, part_lse) + log(1 + e)
// in f32, rounded once to F. Bound by memory: part is read, and o read and written, once.
// Legend: T query rows, H heads, W head width. A pair is a row and a head.
#include <climits>

#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/pack.cuh"

namespace dstrain {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;        // packs of each tensor that a thread has under way
constexpr int kMostPairs = 256;  // of a block

template <class F>
struct Merge {
  const F* part;
  F* o;
  const float* part_lse;
  float* lse;
  const int32_t* table;
  const int32_t* count;
  int64_t T;
  int64_t max_count, max_queries;
  int64_t chunks;  // of the pairs of a segment, one a block
  int H;
  unsigned W, pairs;  // of a chunk
};

struct Shares {
  float own, part;
};

__device__ __forceinline__ Shares merge_lse(float& lse, float part_lse) {
  const float d = part_lse - lse, e = expf(-fabsf(d));
  const float large = 1.0f / (1.0f + e), small = e * large;
  lse = fmaxf(lse, part_lse) + log1pf(e);
  return d > 0 ? Shares{small, large} : Shares{large, small};
}

// Packs first, first + kThreads, ... of a chunk, of `count`.
template <class F, int kSize>
struct Packs {
  Pack<F, kSize> own[kBatch], part[kBatch];

  __device__ __forceinline__ void load(const F* o, const F* other, unsigned first, unsigned count) {
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i) {
      const unsigned pack = first + i * kThreads;
      if (pack >= count) continue;
      own[i] = Pack<F, kSize>::load(o + pack * kSize);
      part[i] = Pack<F, kSize>::load(other + pack * kSize);
    }
  }
  __device__ __forceinline__ void merge(const Shares* shares, unsigned W, F* o, unsigned first,
                                        unsigned count) {
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i) {
      const unsigned pack = first + i * kThreads;
      if (pack >= count) continue;
      const Shares share = shares[pack * kSize / W];
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        own[i].at[j] = from_float<F>(
            fmaf(share.own, to_float(own[i].at[j]), share.part * to_float(part[i].at[j])));
      own[i].store(o + pack * kSize);
    }
  }
};

// A block merges one chunk of one segment.
template <class F, int kSize>
__global__ void __launch_bounds__(kThreads) merge_attention_kernel(const Merge<F> m) {
  __shared__ Shares shares[kMostPairs];
  const int64_t n = blockIdx.x / m.chunks, chunk = blockIdx.x % m.chunks;
  const int count = *m.count;
  if (count > m.max_count) __trap();
  if (n >= count) return;
  const int64_t query = m.table[4 * n], queries = m.table[4 * n + 1];
  if (query < 0 || queries < 0 || query + queries > m.T || queries > m.max_queries) __trap();
  const int64_t begin = chunk * m.pairs, end = min(begin + m.pairs, queries * m.H);
  if (begin >= end) return;
  const int64_t first_pair = query * m.H + begin;
  const unsigned pairs = static_cast<unsigned>(end - begin), packs = pairs * m.W / kSize;
  const F* const part = m.part + first_pair * m.W;
  F* const o = m.o + first_pair * m.W;

  Packs<F, kSize> batch;
  unsigned first = threadIdx.x;
  batch.load(o, part, first, packs);
  if (threadIdx.x < pairs) {
    float lse = m.lse[first_pair + threadIdx.x];
    shares[threadIdx.x] = merge_lse(lse, m.part_lse[first_pair + threadIdx.x]);
    m.lse[first_pair + threadIdx.x] = lse;
  }
  __syncthreads();
  for (;;) {
    batch.merge(shares, m.W, o, first, packs);
    first += kBatch * kThreads;
    if (first >= packs) break;
    batch.load(o, part, first, packs);
  }
}

template <class F, int kSize>
void launch_merge(Stream& stream, Merge<F> m) {
  const int64_t packs_of_pair = std::max<int64_t>(m.W / kSize, 1);
  m.pairs =
      static_cast<unsigned>(std::clamp<int64_t>(kThreads * kBatch / packs_of_pair, 1, kMostPairs));
  m.chunks = ceil_div(m.max_queries * m.H, m.pairs);
  DSTRAIN_CHECK(m.chunks * m.max_count <= INT_MAX,
                "merge_attention: more pieces than a launch can have");
  merge_attention_kernel<F, kSize>
      <<<static_cast<unsigned>(m.chunks * m.max_count), kThreads, 0, cuda(stream)>>>(m);
  check_launch("merge_attention");
}

}  // namespace

void CudaOps::merge_attention(Stream& stream, const Tensor& part_THW, const Tensor& part_lse_TH,
                              const AttentionSegments& segments, const Tensor& o_THW,
                              const Tensor& lse_TH) {
  DSTRAIN_CHECK(o_THW.dims() == 3, "merge_attention takes [rows, heads, width]");
  const int64_t T = o_THW.size(0), H = o_THW.size(1), W = o_THW.size(2);
  expect(o_THW, "merge_attention: o_THW", o_THW.dtype(), {T, H, W});
  expect(part_THW, "merge_attention: part_THW", o_THW.dtype(), {T, H, W});
  expect(part_lse_TH, "merge_attention: part_lse_TH", DType::f32, {T, H});
  expect(lse_TH, "merge_attention: lse_TH", DType::f32, {T, H});
  expect(segments.table_N4, "the segment table", DType::i32, {segments.table_N4.size(0), 4});
  const int64_t count = segments.max_count > 0 ? segments.max_count : segments.table_N4.size(0);
  if (o_THW.numel() == 0 || count == 0 || segments.max_queries == 0) return;
  dispatch_f(o_THW.dtype(), "merge_attention", [&]<class F>() {
    const Merge<F> m{.part = pointer<const F>(part_THW),
                     .o = pointer<F>(o_THW),
                     .part_lse = pointer<const float>(part_lse_TH),
                     .lse = pointer<float>(lse_TH),
                     .table = pointer<const int32_t>(segments.table_N4),
                     .count = pointer<const int32_t>(segments.count_1),
                     .T = T,
                     .max_count = count,
                     .max_queries = segments.max_queries,
                     .chunks = 0,
                     .H = static_cast<int>(H),
                     .W = static_cast<unsigned>(W),
                     .pairs = 0};
    if (fits_vectors<F>(part_THW.raw(), W, W) && fits_vectors<F>(o_THW.raw(), W, W))
      launch_merge<F, kVector<F>>(stream, m);
    else
      launch_merge<F, 1>(stream, m);
  });
}

}  // namespace dstrain
