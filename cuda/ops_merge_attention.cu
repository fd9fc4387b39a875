// Attention to two sets of keys from attention to each. With d = part_lse - lse and e = exp(-|d|),
// the set of the larger log-sum-exp has the share 1 / (1 + e) of the whole, the other the rest:
//   out = own share * o + part's share * part,  lse = max(lse, part_lse) + log(1 + e)
// in f32, rounded once to what out is. Bound by memory: what a row needs of part and o is read, and
// out written, once; rows that stay what they are are copied if out is not o.
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

template <class F, class In, class Out>
struct Merge {
  const F* part;
  const In* o;
  Out* out;
  const float* part_lse;
  float* lse;
  const int32_t* table;
  const int32_t* count;
  int64_t max_count;
  int64_t pairs;  // of all rows
  int H;
  unsigned W, block_pairs;
  bool in_place;
};

// What is not merged is read and written with share 1 of its own, and left alone with none.
struct Shares {
  float own, part;
  __device__ bool merges() const { return part != 0; }
  __device__ bool changes() const { return own != 0 || part != 0; }
};

__device__ __forceinline__ Shares merge_lse(float& lse, float part_lse) {
  const float d = part_lse - lse, e = expf(-fabsf(d));
  const float large = 1.0f / (1.0f + e), small = e * large;
  lse = fmaxf(lse, part_lse) + log1pf(e);
  return d > 0 ? Shares{small, large} : Shares{large, small};
}

// Whether a segment has the row; queries ascend from segment to segment.
__device__ __forceinline__ bool in_segment(const int32_t* table, int count, int64_t row) {
  int begin = 0, end = count;  // segments before `begin` start at or before the row, `end` after it
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (table[4 * middle] <= row)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin > 0 && row < int64_t{table[4 * begin - 4]} + table[4 * begin - 3];
}

// Packs first, first + kThreads, ... after `begin`, whose shares these are. kAll: all merge.
template <bool kAll, int kSize, class F, class In, class Out>
__device__ __forceinline__ void merge_packs(const Merge<F, In, Out>& m, const Shares* share,
                                            int64_t begin, unsigned first) {
  Pack<In, kSize> own[kBatch] = {};
  Pack<F, kSize> part[kBatch] = {};
#pragma unroll
  for (unsigned i = 0; i < kBatch; ++i) {
    const int64_t at = begin + (first + i * kThreads) * kSize;
    if (kAll || share[i].changes()) own[i] = Pack<In, kSize>::load(m.o + at);
    if (kAll || share[i].merges()) part[i] = Pack<F, kSize>::load(m.part + at);
  }
#pragma unroll
  for (unsigned i = 0; i < kBatch; ++i) {
    if (!kAll && !share[i].changes()) continue;
    Pack<Out, kSize> sum;
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      sum.at[j] = from_float<Out>(
          fmaf(share[i].own, to_float(own[i].at[j]), share[i].part * to_float(part[i].at[j])));
    sum.store(m.out + begin + (first + i * kThreads) * kSize);
  }
}

// A block has block_pairs neighbouring pairs.
template <class F, class In, class Out, int kSize>
__global__ void __launch_bounds__(kThreads) merge_attention_kernel(const Merge<F, In, Out> m) {
  __shared__ Shares shares[kMostPairs];
  const int64_t first_pair = int64_t{blockIdx.x} * m.block_pairs;
  const unsigned pairs = static_cast<unsigned>(min(int64_t{m.block_pairs}, m.pairs - first_pair));
  const int count = *m.count;
  if (count > m.max_count) __trap();
  if (threadIdx.x < pairs) {
    const int64_t pair = first_pair + threadIdx.x;
    Shares share{m.in_place ? 0.0f : 1.0f, 0};
    if (in_segment(m.table, count, pair / m.H)) {
      float lse = m.lse[pair];
      share = merge_lse(lse, m.part_lse[pair]);
      m.lse[pair] = lse;
    }
    shares[threadIdx.x] = share;
  }
  __syncthreads();
  const int64_t begin = first_pair * m.W;
  const unsigned packs = pairs * m.W / kSize;
  for (unsigned first = threadIdx.x; first < packs; first += kBatch * kThreads) {
    Shares share[kBatch];
    bool all = true;
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i) {
      const unsigned pack = first + i * kThreads;
      share[i] = pack < packs ? shares[pack * kSize / m.W] : Shares{0, 0};
      all = all && share[i].merges();
    }
    if (all)
      merge_packs<true, kSize>(m, share, begin, first);
    else
      merge_packs<false, kSize>(m, share, begin, first);
  }
}

template <class F, class In, class Out, int kSize>
void launch_merge(Stream& stream, Merge<F, In, Out> m) {
  const int64_t packs_of_pair = std::max<int64_t>(m.W / kSize, 1);
  m.block_pairs =
      static_cast<unsigned>(std::clamp<int64_t>(kThreads * kBatch / packs_of_pair, 1, kMostPairs));
  const int64_t blocks = ceil_div(m.pairs, m.block_pairs);
  DSTRAIN_CHECK(blocks <= INT_MAX, "merge_attention: more pieces than a launch can have");
  merge_attention_kernel<F, In, Out, kSize>
      <<<static_cast<unsigned>(blocks), kThreads, 0, cuda(stream)>>>(m);
  check_launch("merge_attention");
}

}  // namespace

void CudaOps::merge_attention(Stream& stream, const Tensor& part_THW, const Tensor& part_lse_TH,
                              const AttentionSegments& segments, const Tensor& o_THW,
                              const Tensor& lse_TH, const Tensor& out_THW) {
  DSTRAIN_CHECK(part_THW.dims() == 3, "merge_attention takes [rows, heads, width]");
  const int64_t T = part_THW.size(0), H = part_THW.size(1), W = part_THW.size(2);
  expect(part_THW, "merge_attention: part_THW", part_THW.dtype(), {T, H, W});
  expect(part_lse_TH, "merge_attention: part_lse_TH", DType::f32, {T, H});
  expect(o_THW, "merge_attention: o_THW", o_THW.dtype(), {T, H, W});
  expect(lse_TH, "merge_attention: lse_TH", DType::f32, {T, H});
  expect(out_THW, "merge_attention: out_THW", out_THW.dtype(), {T, H, W});
  const Tensor& table_N4 = segments.table_N4;
  expect(table_N4, "the segment table", DType::i32, {table_N4.size(0), 4});
  if (out_THW.numel() == 0) return;
  const auto with_types = [&]<class F, class In, class Out>() {
    const Merge<F, In, Out> m{.part = pointer<const F>(part_THW),
                              .o = pointer<const In>(o_THW),
                              .out = pointer<Out>(out_THW),
                              .part_lse = pointer<const float>(part_lse_TH),
                              .lse = pointer<float>(lse_TH),
                              .table = pointer<const int32_t>(table_N4),
                              .count = pointer<const int32_t>(segments.count_1),
                              .max_count = table_N4.size(0),
                              .pairs = T * H,
                              .H = static_cast<int>(H),
                              .W = static_cast<unsigned>(W),
                              .block_pairs = 0,
                              .in_place = o_THW.raw() == out_THW.raw()};
    constexpr int kSize = kVector<F>;
    const auto aligned = [](const Tensor& x) {
      return reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0;
    };
    if (W % kSize == 0 && aligned(part_THW) && aligned(o_THW) && aligned(out_THW))
      launch_merge<F, In, Out, kSize>(stream, m);
    else
      launch_merge<F, In, Out, 1>(stream, m);
  };
  const char* const op = "merge_attention";
  dispatch_f(part_THW.dtype(), op, [&]<class F>() {
    dispatch_f_or_s<F>(o_THW.dtype(), op, [&]<class In>() {
      dispatch_f_or_s<F>(out_THW.dtype(), op,
                         [&]<class Out>() { with_types.template operator()<F, In, Out>(); });
    });
  });
}

}  // namespace dstrain
