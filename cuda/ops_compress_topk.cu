// Exact top-k of gradients by magnitude, block by block, to the same bytes as on the CPU
// (core/backend/compressed_format.h, cpu_ops_compress.cpp). v = grad + residual is what should be sent. P pieces of N
// elements. A thread block has a block of the format.
#include "cuda/compress.cuh"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTopkThreads = 512, kTopkWarps = kTopkThreads / 32;
constexpr int64_t kSharedElements = 9216;  // of a block whose values are kept in shared memory

// --- stored values -----------------------------------------------------------------------------------------

struct F32Values {
  using Stored = float;
  __device__ __forceinline__ static Stored store(float value) { return value; }
  __device__ __forceinline__ static float load(Stored stored) { return stored; }
};
struct Bf16Values {
  using Stored = uint16_t;
  // The nearest, ties to even; what is finite stays finite.
  __device__ __forceinline__ static Stored store(float value) {
    const uint32_t bits = __float_as_uint(value), magnitude = bits & kMagnitude;
    if (magnitude > kInfinity) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // a quiet NaN
    uint32_t rounded = (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
    if (magnitude < kInfinity) rounded = min(rounded, 0x7f7fu);
    return static_cast<uint16_t>((bits >> 31 << 15) | rounded);
  }
  __device__ __forceinline__ static float load(Stored stored) { return __uint_as_float(uint32_t{stored} << 16); }
};

// TopkFormat for pieces of n elements, in numbers that a kernel needs.
struct TopkShape {
  int64_t n, blocks, kept_total, payload_stride, payload_bytes;
  int block, kept, kept_last;

  TopkShape(const TopkFormat& format, int64_t elements, const Tensor& payload_PB)
      : n(elements),
        blocks(ceil_div(elements, format.block)),
        kept_total(format.kept_total(elements)),
        payload_stride(payload_PB.row_stride()),
        payload_bytes(payload_PB.size(1)),
        block(static_cast<int>(format.block)),
        kept(static_cast<int>(format.kept(format.block))),
        kept_last(static_cast<int>(format.kept(elements - (blocks - 1) * format.block))) {}

  __device__ __forceinline__ int count_of(int64_t b) const {
    return static_cast<int>(min(int64_t{block}, n - b * block));
  }
  __device__ __forceinline__ int kept_of(int64_t b) const { return b + 1 == blocks ? kept_last : kept; }
};

// Where the values and indices of a block are in the payload of a piece.
template <class Values>
struct TopkPlace {
  typename Values::Stored* values;
  uint16_t* indices;

  __device__ __forceinline__ TopkPlace(const TopkShape& shape, uint8_t* payload_PB, int64_t piece, int64_t b) {
    auto* const all = reinterpret_cast<typename Values::Stored*>(payload_PB + piece * shape.payload_stride);
    values = all + b * shape.kept;
    indices = reinterpret_cast<uint16_t*>(all + shape.kept_total) + b * shape.kept;
  }
};

// --- selection ---------------------------------------------------------------------------------------------

// The elements of a block: in shared memory, or, where they do not fit, added up each time.
template <bool kInShared>
struct BlockValues {
  const float* shared;
  const float* grad;
  const float* residual;

  __device__ __forceinline__ float sum(int i) const { return residual ? grad[i] + residual[i] : grad[i]; }
  __device__ __forceinline__ float operator[](int i) const { return kInShared ? shared[i] : sum(i); }
};

// The k elements of largest magnitude are those above `magnitude` and the first `ties` that equal it.
struct Selection {
  uint32_t magnitude = 0;
  int ties = 0;
};

constexpr int kMostBins = 2048;

// Finds, from the largest on, the bin in which the wanted-th element falls; `wanted` becomes its place in the bin.
// One warp. The result is in every lane.
__device__ __forceinline__ int find_bin(const int32_t* bins, int count, int& wanted) {
  const int lane = threadIdx.x % 32;
  for (int top = count - 1;; top -= 32) {
    const int own = bins[top - lane];
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += before;
    }
    const unsigned reached = __ballot_sync(kAllLanes, sum >= wanted);
    if (reached != 0) {
      const int first = __ffs(static_cast<int>(reached)) - 1;
      wanted -= __shfl_sync(kAllLanes, sum - own, first);
      return top - first;
    }
    wanted -= __shfl_sync(kAllLanes, sum, 31);
  }
}

// The 31 bits of a magnitude are decided from the highest on, 11, 10 and 10 at a time.
template <class Elements>
__device__ __forceinline__ Selection select_topk(const Elements& v, int n, int k, int32_t* bins, int32_t* found) {
  if (k == n) return {0, n};
  uint32_t prefix = 0;
  int wanted = k;
#pragma unroll 1
  for (int shift = 20; shift >= 0; shift -= 10) {
    const int bits = shift == 20 ? 11 : 10, count = 1 << bits;
    for (int i = threadIdx.x; i < count; i += kTopkThreads) bins[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kTopkThreads) {
      const uint32_t magnitude = magnitude_of(v[i]) >> shift;
      if (magnitude >> bits == prefix) atomicAdd(&bins[magnitude & (count - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const int bin = find_bin(bins, count, wanted);
      if (threadIdx.x == 0) {
        found[0] = bin;
        found[1] = wanted;
      }
    }
    __syncthreads();
    prefix = prefix << bits | static_cast<uint32_t>(found[0]);
    wanted = found[1];
  }
  return {prefix, wanted};
}

// How many elements of a run are above the threshold, and how many equal it.
struct Above {
  int larger = 0, equal = 0;
};

template <class Values, bool kInShared>
__global__ void __launch_bounds__(kTopkThreads)
    topk_compress_kernel(const float* __restrict__ grad_PN, float* residual_PN, TopkShape shape,
                         uint8_t* payload_PB) {
  extern __shared__ float shared_values[];
  __shared__ int32_t bins[kMostBins], found[2], larger[kTopkWarps], equal[kTopkWarps];
  const int64_t piece = blockIdx.x / shape.blocks, b = blockIdx.x % shape.blocks;
  const int64_t begin = piece * shape.n + b * shape.block;
  const int n = shape.count_of(b), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const residual = residual_PN ? residual_PN + begin : nullptr;
  const BlockValues<kInShared> v{shared_values, grad_PN + begin, residual};
  if (kInShared) {
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += kTopkThreads) shared_values[i] = v.sum(i);
    __syncthreads();
  }
  const Selection selection = select_topk(v, n, shape.kept_of(b), bins, found);

  // Each warp has a part of the block, and learns how many elements before it are sent.
  const int part = (n + kTopkThreads - 1) / kTopkThreads * 32;
  const int first = warp * part, end = min(first + part, n);
  Above own;
  for (int i = first + lane; i - lane < end; i += 32) {
    const uint32_t magnitude = i < end ? magnitude_of(v[i]) : 0u;
    own.larger += __popc(__ballot_sync(kAllLanes, i < end && magnitude > selection.magnitude));
    own.equal += __popc(__ballot_sync(kAllLanes, i < end && magnitude == selection.magnitude));
  }
  if (lane == 0) {
    larger[warp] = own.larger;
    equal[warp] = own.equal;
  }
  __syncthreads();
  Above before;
  for (int w = 0; w < warp; ++w) {
    before.larger += larger[w];
    before.equal += equal[w];
  }

  const TopkPlace<Values> place(shape, payload_PB, piece, b);
  const unsigned lower_lanes = (1u << lane) - 1u;
  for (int i = first + lane; i - lane < end; i += 32) {
    const float value = i < end ? v[i] : 0.0f;
    const uint32_t magnitude = magnitude_of(value);
    const unsigned above = __ballot_sync(kAllLanes, i < end && magnitude > selection.magnitude);
    const unsigned same = __ballot_sync(kAllLanes, i < end && magnitude == selection.magnitude);
    const int rank_above = before.larger + __popc(above & lower_lanes);
    const int rank_same = before.equal + __popc(same & lower_lanes);
    before.larger += __popc(above);
    before.equal += __popc(same);
    if (i >= end) continue;
    const bool sent = (above >> lane & 1u) || ((same >> lane & 1u) && rank_same < selection.ties);
    float kept_back = value;
    if (sent) {
      const int at = rank_above + min(rank_same, selection.ties);
      const auto stored = Values::store(value);
      place.values[at] = stored;
      place.indices[at] = static_cast<uint16_t>(i);
      kept_back = value - Values::load(stored);
    }
    if (residual && magnitude < kInfinity) residual[i] = kept_back;
  }
  if (b + 1 == shape.blocks) {
    const int64_t used = shape.kept_total * static_cast<int64_t>(sizeof(typename Values::Stored) + 2);
    if (used + threadIdx.x < shape.payload_bytes)
      payload_PB[piece * shape.payload_stride + used + threadIdx.x] = 0;
  }
}

// --- sum ---------------------------------------------------------------------------------------------------

// A few of the elements that a piece sends for a block, read ahead of their use.
template <class Values>
struct Sent {
  static constexpr int kCount = 2;  // a thread
  typename Values::Stored value[kCount];
  uint16_t index[kCount];

  __device__ __forceinline__ void load(const TopkPlace<Values>& place, int batch, int kept) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = (batch * kCount + j) * kTopkThreads + threadIdx.x;
      if (at < kept) {
        value[j] = place.values[at];
        index[j] = place.indices[at];
      }
    }
  }
  // The first is stored, not added to zero, so that -0 stays what it is.
  __device__ __forceinline__ void add_to(float* sum, bool first, int batch, int kept, int n) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = (batch * kCount + j) * kTopkThreads + threadIdx.x;
      if (at >= kept || index[j] >= n) continue;
      const float sent = Values::load(value[j]);
      sum[index[j]] = first ? sent : sum[index[j]] + sent;
    }
  }
};

// A block sums its elements in shared memory, or in place where they do not fit, piece after piece. The indices of
// a piece are distinct, so that its elements can be added in any order.
template <class Values, bool kInShared>
__global__ void __launch_bounds__(kTopkThreads)
    topk_sum_kernel(uint8_t* payload_PB, int64_t pieces, TopkShape shape, bool add, float* sum_N) {
  extern __shared__ float shared_values[];
  const int64_t b = blockIdx.x;
  const int n = shape.count_of(b), kept = shape.kept_of(b);
  float* const out = sum_N + b * shape.block;
  float* const sum = kInShared ? shared_values : out;
  for (int i = threadIdx.x; i < n; i += kTopkThreads) sum[i] = add ? out[i] : 0.0f;

  constexpr int kPerBatch = Sent<Values>::kCount * kTopkThreads;
  const int batches = (kept + kPerBatch - 1) / kPerBatch;
  Sent<Values> next;
  if (pieces > 0) next.load(TopkPlace<Values>(shape, payload_PB, 0, b), 0, kept);
  int64_t piece = 0;
  int batch = 0;
  while (piece < pieces) {
    const Sent<Values> sent = next;
    const int next_batch = batch + 1 < batches ? batch + 1 : 0;
    const int64_t next_piece = next_batch == 0 ? piece + 1 : piece;
    if (next_piece < pieces) next.load(TopkPlace<Values>(shape, payload_PB, next_piece, b), next_batch, kept);
    if (batch == 0) __syncthreads();
    sent.add_to(sum, piece == 0 && !add, batch, kept, n);
    batch = next_batch;
    piece = next_piece;
  }
  if (!kInShared) return;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kTopkThreads) out[i] = shared_values[i];
}

// --- launches ----------------------------------------------------------------------------------------------

static_assert(kSharedElements * sizeof(float) + (kMostBins + 64) * sizeof(int32_t) <= 48 << 10,
              "values and histogram have to fit what every kernel may use");

// Calls launch.template operator()<stored values, whether blocks are in shared memory>(bytes of it).
template <class Launch>
void dispatch_topk(const TopkFormat& format, int64_t n, const Launch& launch) {
  DSTRAIN_CHECK(format.values == DType::f32 || format.values == DType::bf16,
                std::string("top-k sends f32 or bf16, not ") + dtype_name(format.values));
  const int64_t elements = std::min(format.block, n);
  const auto choose = [&]<class Values>() {
    if (elements <= kSharedElements)
      launch.template operator()<Values, true>(static_cast<size_t>(elements) * sizeof(float));
    else
      launch.template operator()<Values, false>(size_t{0});
  };
  if (format.values == DType::f32)
    choose.template operator()<F32Values>();
  else
    choose.template operator()<Bf16Values>();
}

}  // namespace

void CudaOps::topk_compress(Stream& stream, const Tensor& grad_PN, const TopkFormat& format,
                            const Tensor& residual_PN, const Tensor& payload_PB) {
  const int64_t P = grad_PN.size(0), n = grad_PN.size(1);
  expect_block("topk_compress", format.block);
  expect_pieces("topk_compress", grad_PN, residual_PN, payload_PB, format.payload_bytes(n));
  if (P == 0 || n == 0) return;
  const TopkShape shape(format, n, payload_PB);
  const auto blocks = static_cast<unsigned>(P * shape.blocks);
  dispatch_topk(format, n, [&]<class Values, bool kInShared>(size_t bytes) {
    topk_compress_kernel<Values, kInShared><<<blocks, kTopkThreads, bytes, cuda(stream)>>>(
        pointer<const float>(grad_PN), pointer<float>(residual_PN), shape, pointer<uint8_t>(payload_PB));
  });
  check_launch("topk_compress");
}

void CudaOps::topk_sum(Stream& stream, const Tensor& payload_PB, const TopkFormat& format, Accumulate accumulate,
                       const Tensor& sum_N) {
  const int64_t P = payload_PB.size(0), n = sum_N.numel();
  expect_block("topk_sum", format.block);
  expect_sum("topk_sum", payload_PB, sum_N, format.payload_bytes(n));
  if (n == 0) return;
  const TopkShape shape(format, n, payload_PB);
  const auto blocks = static_cast<unsigned>(shape.blocks);
  dispatch_topk(format, n, [&]<class Values, bool kInShared>(size_t bytes) {
    topk_sum_kernel<Values, kInShared><<<blocks, kTopkThreads, bytes, cuda(stream)>>>(
        pointer<uint8_t>(payload_PB), P, shape, accumulate == Accumulate::add, pointer<float>(sum_N));
  });
  check_launch("topk_sum");
}

}  // namespace dstrain
