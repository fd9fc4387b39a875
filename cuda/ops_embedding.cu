// Embedding lookup, x[t] = W[token[t]], and its gradient. T tokens, V rows of the vocabulary held
// here, D columns. The gradient sorts the tokens, stably, and adds the rows of equal ones in the
// order of their positions, in f32: a block takes `chunk` sorted tokens, which depends on T only. A
// run of equal tokens within one chunk is written at once; one that crosses chunks leaves a partial
// sum in each, and the sum of these is added last.
#include "core/backend/ops.h"
#include "cuda/cuda_ops.h"
#include "cuda/pack.cuh"
#include "cuda/planning_ops.h"
#include "cuda/token_sort.h"

namespace dstrain {
namespace {

constexpr int kThreads = 256;
constexpr int kMostChunk = 256;
constexpr int kCopyBatch = 4;  // rows of the lookup that a thread has under way
constexpr int kSumBatch = 4;   // rows of the gradient, and with them as many rows of the sum
constexpr int kSumThreads = 128;

// Blocks of 256 threads over rows of n packs: blockDim.x of them for a row.
dim3 block_for(int64_t n) {
  unsigned threads = 32;
  while (threads < kThreads && threads < n) threads *= 2;
  return dim3(threads, kThreads / threads);
}

template <class F, int kSize>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const int32_t* __restrict__ tokens_T, const F* __restrict__ weight_VD,
                     int64_t weight_stride, int64_t vocab_begin, int64_t V, int64_t T, int64_t D,
                     F* __restrict__ x_TD, int64_t x_stride) {
  using P = Pack<F, kSize>;
  const int64_t first = int64_t{blockIdx.x} * blockDim.y * kCopyBatch + threadIdx.y;
  int64_t v[kCopyBatch];
#pragma unroll
  for (int i = 0; i < kCopyBatch; ++i) {
    const int64_t t = first + i * blockDim.y;
    v[i] = t < T ? tokens_T[t] - vocab_begin : -1;
  }
  for (int64_t d = int64_t{threadIdx.x} * kSize; d < D; d += int64_t{blockDim.x} * kSize) {
    P x[kCopyBatch] = {};
#pragma unroll
    for (int i = 0; i < kCopyBatch; ++i)
      if (v[i] >= 0 && v[i] < V) x[i] = P::load(weight_VD + v[i] * weight_stride + d);
#pragma unroll
    for (int i = 0; i < kCopyBatch; ++i)
      if (first + i * blockDim.y < T) x[i].store(x_TD + (first + i * blockDim.y) * x_stride + d);
  }
}

template <int kSize>
__global__ void __launch_bounds__(kThreads)
    clear_unused_kernel(const uint8_t* __restrict__ used_V, int64_t V, int64_t D,
                        float* __restrict__ dweight_VD, int64_t stride) {
  const int64_t v = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (v >= V || used_V[v]) return;
  const Pack<float, kSize> zeros = {};
  for (int64_t d = int64_t{threadIdx.x} * kSize; d < D; d += int64_t{blockDim.x} * kSize)
    zeros.store(dweight_VD + v * stride + d);
}

struct SortedTokens {
  const uint32_t* keys_T;  // ascending; V and above: not here
  const int32_t* positions_T;
  int64_t T;
  uint32_t V;
  int chunk;

  static constexpr uint32_t kNone = 0xffffffffu;
  __device__ uint32_t key(int64_t i) const { return i >= 0 && i < T ? keys_T[i] : kNone; }
};

struct WeightGradient {
  float* data_VD;
  int64_t stride, D;
  bool add;

  // Row v, columns d .. d + kSize - 1: what was there, and what is there now.
  template <int kSize>
  __device__ __forceinline__ Pack<float, kSize> before(uint32_t v, int64_t d) const {
    Pack<float, kSize> zeros = {};
    return add ? Pack<float, kSize>::load(data_VD + v * stride + d) : zeros;
  }
  template <int kSize>
  __device__ __forceinline__ void put(uint32_t v, int64_t d, Pack<float, kSize> sum,
                                      const Pack<float, kSize>& before) const {
    if (add) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum.at[j] += before.at[j];
    }
    sum.store(data_VD + v * stride + d);
  }
};

// blockIdx.x is the chunk, blockIdx.y counts columns. partial_C2D: the sum of a run that began in
// an earlier chunk, and of one that began here and goes on in the next.
template <class F, int kSize>
__global__ void __launch_bounds__(kSumThreads)
    sum_chunks_kernel(const SortedTokens tokens, const F* __restrict__ dx_TD, int64_t dx_stride,
                      const WeightGradient dweight, float* __restrict__ partial_C2D) {
  __shared__ uint32_t keys[kMostChunk + 2];  // from the one before the chunk to the one after it
  __shared__ int32_t positions[kMostChunk];
  const int64_t first = int64_t{blockIdx.x} * tokens.chunk, D = dweight.D;
  const int n = static_cast<int>(min(int64_t{tokens.chunk}, tokens.T - first));
  for (int i = threadIdx.x; i < n + 2; i += blockDim.x) {
    keys[i] = tokens.key(first - 1 + i);
    if (i < n) positions[i] = tokens.positions_T[first + i];
  }
  __syncthreads();
  const int64_t d = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kSize;
  if (d >= D) return;
  Pack<float, kSize> sum = {};
  for (int begin = 0; begin < n; begin += kSumBatch) {
    Pack<F, kSize> rows[kSumBatch];
    Pack<float, kSize> before[kSumBatch];
#pragma unroll
    for (int i = 0; i < kSumBatch; ++i) {
      const int at = min(begin + i, n - 1);
      const uint32_t key = keys[at + 1];
      if (begin + i >= n || key >= tokens.V) continue;
      rows[i] = Pack<F, kSize>::load(dx_TD + positions[at] * dx_stride + d);
      if (keys[at + 2] != key && keys[0] != key) before[i] = dweight.before<kSize>(key, d);
    }
#pragma unroll
    for (int i = 0; i < kSumBatch; ++i) {
      const int at = begin + i;
      if (at >= n) return;
      const uint32_t key = keys[at + 1];
      if (key >= tokens.V) return;  // and so are all that follow
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum.at[j] += to_float(rows[i].at[j]);
      const bool goes_on = keys[at + 2] == key;
      if (goes_on && at + 1 < n) continue;
      const bool began_before = keys[0] == key;
      if (began_before || goes_on)
        sum.store(partial_C2D + (2 * int64_t{blockIdx.x} + (began_before ? 0 : 1)) * D + d);
      else
        dweight.put(key, d, sum, before[i]);
      sum = {};
    }
  }
}

// A run that crosses chunks is finished by the block of the chunk where it began.
template <int kSize>
__global__ void __launch_bounds__(kSumThreads)
    finish_runs_kernel(const SortedTokens tokens, const WeightGradient dweight,
                       const float* __restrict__ partial_C2D) {
  using P = Pack<float, kSize>;
  const int64_t chunk = blockIdx.x, end = (chunk + 1) * tokens.chunk, D = dweight.D;
  const uint32_t key = tokens.key(end - 1);
  if (key >= tokens.V || tokens.key(end) != key || tokens.key(end - tokens.chunk - 1) == key)
    return;
  const int64_t d = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kSize;
  if (d >= D) return;
  int64_t low = end, high = tokens.T;  // the run ends in (low, high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (tokens.keys_T[middle] == key ? low : high) = middle;
  }
  const int64_t last_chunk = (high - 1) / tokens.chunk;
  P sum = P::load(partial_C2D + (2 * chunk + 1) * D + d);
#pragma unroll 8
  for (int64_t c = chunk + 1; c <= last_chunk; ++c) {
    const P part = P::load(partial_C2D + 2 * c * D + d);
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum.at[j] += part.at[j];
  }
  dweight.put(key, d, sum, dweight.before<kSize>(key, d));
}

// The pieces of scratch of one backward pass.
struct BackwardPlan {
  TokenSort sort;
  int chunk;
  int64_t chunks;
  int64_t bytes;

  BackwardPlan(int64_t T, int64_t V, int64_t D)
      : sort(T, V),
        chunk(static_cast<int>(
            std::clamp<int64_t>(ceil_div(ceil_div(T, 512), 32) * 32, 32, kMostChunk))),
        chunks(ceil_div(T, chunk)),
        bytes(sort.scratch_bytes() + ScratchPieces::padded(V) +
              ScratchPieces::padded(2 * chunks * D * 4)) {}
};

void expect_embedding(const Tensor& tokens_T, const Tensor& weight_VD, const Tensor& x_TD,
                      const char* op) {
  DSTRAIN_CHECK(tokens_T.dtype() == DType::i32 && tokens_T.dims() == 1 && weight_VD.dims() == 2 &&
                    x_TD.dims() == 2 && x_TD.size(0) == tokens_T.size(0) &&
                    x_TD.size(1) == weight_VD.size(1),
                std::string(op) + ": tokens " + tokens_T.describe() + ", weight " +
                    weight_VD.describe() + ", x " + x_TD.describe());
}

void clear_unused(Stream& stream, const uint8_t* used_V, const Tensor& dweight_VD) {
  const int64_t V = dweight_VD.size(0), D = dweight_VD.size(1);
  const auto launch = [&]<int kSize>() {
    const dim3 block = block_for(ceil_div(D, kSize));
    clear_unused_kernel<kSize>
        <<<static_cast<unsigned>(ceil_div(V, block.y)), block, 0, cuda(stream)>>>(
            used_V, V, D, pointer<float>(dweight_VD), dweight_VD.row_stride());
    check_launch("embedding_backward: rows without tokens");
  };
  if (fits_vectors<float>(dweight_VD.raw(), D, dweight_VD.row_stride()))
    launch.template operator()<kVector<float>>();
  else
    launch.template operator()<1>();
}

template <class F, int kSize>
void sum_tokens(Stream& stream, const SortedTokens& tokens, const Tensor& dx_TD,
                const WeightGradient& dweight, int64_t chunks, float* partial_C2D) {
  const int64_t packs = ceil_div(dweight.D, kSize);
  const unsigned threads = std::min<unsigned>(block_for(packs).x, kSumThreads);
  const int64_t column_blocks = ceil_div(packs, threads);
  DSTRAIN_CHECK(column_blocks <= 65535, "embedding_backward: dx is " + dx_TD.describe());
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(column_blocks));
  sum_chunks_kernel<F, kSize><<<grid, threads, 0, cuda(stream)>>>(
      tokens, pointer<F>(dx_TD), dx_TD.row_stride(), dweight, partial_C2D);
  check_launch("embedding_backward");
  finish_runs_kernel<kSize><<<grid, threads, 0, cuda(stream)>>>(tokens, dweight, partial_C2D);
  check_launch("embedding_backward: tokens of many places");
}

}  // namespace

void CudaOps::embedding(Stream& stream, const Tensor& tokens_T, const Tensor& weight_VD,
                        int64_t vocab_begin, const Tensor& x_TD) {
  expect_embedding(tokens_T, weight_VD, x_TD, "embedding");
  DSTRAIN_CHECK(x_TD.dtype() == weight_VD.dtype(), "embedding: element types differ");
  const int64_t V = weight_VD.size(0), D = weight_VD.size(1), T = tokens_T.size(0);
  if (T == 0 || D == 0) return;
  dispatch_f(x_TD.dtype(), "embedding", [&]<class F>() {
    const auto launch = [&]<int kSize>() {
      const dim3 block = block_for(ceil_div(D, kSize));
      embedding_kernel<F, kSize>
          <<<static_cast<unsigned>(ceil_div(T, block.y * kCopyBatch)), block, 0, cuda(stream)>>>(
              pointer<int32_t>(tokens_T), pointer<F>(weight_VD), weight_VD.row_stride(),
              vocab_begin, V, T, D, pointer<F>(x_TD), x_TD.row_stride());
    };
    if (fits_vectors<F>(weight_VD.raw(), D, weight_VD.row_stride()) &&
        fits_vectors<F>(x_TD.raw(), D, x_TD.row_stride()))
      launch.template operator()<kVector<F>>();
    else
      launch.template operator()<1>();
  });
  check_launch("embedding");
}

void CudaOps::embedding_backward(Stream& stream, const Tensor& tokens_T, const Tensor& dx_TD,
                                 int64_t vocab_begin, Accumulate accumulate,
                                 const Tensor& dweight_VD) {
  expect_embedding(tokens_T, dweight_VD, dx_TD, "embedding_backward");
  DSTRAIN_CHECK(dweight_VD.dtype() == DType::f32,
                "embedding_backward: dweight_VD is " + dweight_VD.describe() + ", not f32");
  const int64_t V = dweight_VD.size(0), D = dweight_VD.size(1), T = tokens_T.size(0);
  const bool overwrite = accumulate == Accumulate::overwrite;
  if (T == 0 && overwrite) fill(stream, dweight_VD, 0.0);
  if (T == 0 || V == 0 || D == 0) return;

  const BackwardPlan plan(T, V, D);
  ScratchPieces scratch(stream, plan.bytes);
  uint8_t* const used_V = overwrite ? scratch.take<uint8_t>(V) : nullptr;
  float* const partial_C2D = scratch.take<float>(2 * plan.chunks * D);

  if (overwrite)
    check_cuda(cudaMemsetAsync(used_V, 0, static_cast<size_t>(V), cuda(stream)),
               "embedding_backward");
  const TokenSort::Sorted sorted =
      plan.sort.run(stream, scratch, pointer<int32_t>(tokens_T), vocab_begin, used_V);
  if (overwrite) clear_unused(stream, used_V, dweight_VD);

  const SortedTokens tokens{sorted.keys_T, sorted.positions_T, T, static_cast<uint32_t>(V),
                            plan.chunk};
  const WeightGradient dweight{pointer<float>(dweight_VD), dweight_VD.row_stride(), D, !overwrite};
  dispatch_f(dx_TD.dtype(), "embedding_backward", [&]<class F>() {
    // Vectors of dweight, and as many elements of dx.
    constexpr int kSize = kVector<float>;
    if (reinterpret_cast<uintptr_t>(dx_TD.raw()) % (kSize * sizeof(F)) == 0 &&
        dx_TD.row_stride() % kSize == 0 &&
        fits_vectors<float>(dweight_VD.raw(), D, dweight_VD.row_stride()))
      sum_tokens<F, kSize>(stream, tokens, dx_TD, dweight, plan.chunks, partial_C2D);
    else
      sum_tokens<F, 1>(stream, tokens, dx_TD, dweight, plan.chunks, partial_C2D);
  });
}

void PlanningOps::embedding_backward(Stream&, const Tensor& tokens_T, const Tensor&, int64_t,
                                     Accumulate, const Tensor& dweight_VD) {
  note(BackwardPlan(tokens_T.size(0), dweight_VD.size(0), dweight_VD.size(1)).bytes);
}

}  // namespace dstrain
