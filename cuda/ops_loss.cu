// Cross-entropy over a slice of the vocabulary, in place of the logits; the formulas are in
// core/backend/cpu_ops_loss.cpp. T tokens, V logits of a token held here, K alternatives of a soft target.
//
// A block has a row, which it reads once: each thread keeps the largest logit that it saw and the sum of
// exponentials relative to it. Rows are read in vectors of 16 bytes wherever they begin; what stands before the
// first whole vector and after the last is read one by one.
#include "core/backend/expect.h"
#include "cuda/add_partials.cuh"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"
#include "cuda/rows.cuh"

namespace dstrain {
namespace {

constexpr int kThreads = 512;   // of a block that has a row, and the most alternatives of a soft target
constexpr int kTokens = 256;    // of a block that adds losses
constexpr int kInFlight = 4;    // vectors whose loads are under way together

// exp with the error of ex2.approx, 2 ulp, and of a product; results below 2^-126 are 0.
__device__ __forceinline__ float quick_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// The target distribution of each token: K alternatives, of which a hard target is one with probability 1.
struct Targets {
  const int32_t* hard_T = nullptr;
  Rows<const int32_t> index_TK;
  Rows<const float> prob_TK;
  int K = 1;

  __device__ __forceinline__ int index(int64_t t, int k) const { return hard_T ? hard_T[t] : index_TK[t][k]; }
  __device__ __forceinline__ float prob(int64_t t, int k) const {
    if (hard_T) return hard_T[t] >= 0 ? 1.0f : 0.0f;
    return prob_TK[t][k];
  }
  __device__ __forceinline__ float weight(int64_t t) const {
    float sum = 0.0f;
  #pragma unroll 4
    for (int k = 0; k < K; ++k) sum += prob(t, k);
    return sum;
  }
};

Targets targets_of(const CrossEntropyTargets& targets, int64_t T) {
  const bool hard = targets.hard_T.defined();
  DSTRAIN_CHECK(hard != targets.soft_index_TK.defined() &&
                    targets.soft_index_TK.defined() == targets.soft_prob_TK.defined(),
                "cross_entropy: either hard or soft targets");
  Targets out;
  if (hard) {
    expect(targets.hard_T, "cross_entropy: hard_T", DType::i32, {T});
    out.hard_T = pointer<const int32_t>(targets.hard_T);
    return out;
  }
  const int64_t K = targets.soft_index_TK.size(1);
  expect_strided(targets.soft_index_TK, "cross_entropy: soft_index_TK", DType::i32, {T, K});
  expect_strided(targets.soft_prob_TK, "cross_entropy: soft_prob_TK", DType::f32, {T, K});
  DSTRAIN_CHECK(K <= kThreads, "cross_entropy: soft targets of " + std::to_string(K) +
                                   " alternatives; the CUDA back end takes at most " + std::to_string(kThreads));
  out.index_TK = rows_of<const int32_t>(targets.soft_index_TK);
  out.prob_TK = rows_of<const float>(targets.soft_prob_TK);
  out.K = static_cast<int>(K);
  return out;
}

// A row as its elements before the first multiple of 16 bytes, whole vectors, and the rest.
template <class F>
struct RowParts {
  static constexpr int kSize = Vec<F>::kSize;
  int head, vectors, tail;

  __device__ __forceinline__ RowParts(const F* row, int V) {
    const auto misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(F));
    head = min(V, (kSize - misaligned) % kSize);
    vectors = (V - head) / kSize;
    tail = V - head - vectors * kSize;
  }
  // Of the elements before and after vectors, the one of this thread; -1 if it has none.
  __device__ __forceinline__ int single() const {
    const int i = threadIdx.x;
    if (i < head) return i;
    return i < head + tail ? i + vectors * kSize : -1;
  }
};

// Keeps `sum` relative to `max`. A row of -infinity sums to 0.
struct RowStatistics {
  float max = -INFINITY, sum = 0.0f;

  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount]) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, x[i]);
    if (largest > max) {
      sum *= quick_exp(max - largest);
      max = largest;
    }
    const float shift = max == -INFINITY ? 0.0f : max;
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) part += quick_exp(x[i] - shift);
    sum += part;
  }
  // Relative to the largest of all threads.
  __device__ __forceinline__ void rescale(float block_max) {
    if (max != block_max) sum *= quick_exp(max - block_max);
    max = block_max;
  }
};

// Loads vectors v, v + kThreads, ...; from the last on they are -infinity.
template <class F>
__device__ __forceinline__ void load_vectors(const F* from, int v, int vectors, Vec<F> (&out)[kInFlight]) {
  constexpr unsigned kNone = sizeof(F) == 2 ? 0xff80ff80u : 0xff800000u;
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    uint4 bits = make_uint4(kNone, kNone, kNone, kNone);
    if (v + j * kThreads < vectors)
      bits = __ldcs(reinterpret_cast<const uint4*>(from + (v + j * kThreads) * Vec<F>::kSize));
    *reinterpret_cast<uint4*>(out[j].at) = bits;
  }
}

template <class F>
__device__ __forceinline__ RowStatistics statistics_of_thread(const F* row, int V) {
  constexpr int kSize = Vec<F>::kSize;
  const RowParts<F> parts(row, V);
  RowStatistics statistics;
  for (int v = threadIdx.x; v < parts.vectors; v += kInFlight * kThreads) {
    Vec<F> vectors[kInFlight];
    load_vectors(row + parts.head, v, parts.vectors, vectors);
    float x[kInFlight * kSize];
#pragma unroll
    for (int i = 0; i < kInFlight * kSize; ++i) x[i] = to_float(vectors[i / kSize].at[i % kSize]);
    statistics.add(x);
  }
  if (parts.single() >= 0) {
    const float x[1] = {to_float(row[parts.single()])};
    statistics.add(x);
  }
  return statistics;
}

template <class F>
__global__ void __launch_bounds__(kThreads, 2)
    cross_entropy_stats_kernel(Rows<const F> logits_TV, int V, Targets targets, int64_t vocab_begin, float* max_T,
                               float* sum_exp_T, float* target_T) {
  __shared__ float shared[32];
  const int64_t t = blockIdx.x;
  const F* const row = logits_TV[t];
  RowStatistics statistics = statistics_of_thread(row, V);
  float target = 0.0f;
  if (static_cast<int>(threadIdx.x) < targets.K) {
    const int64_t v = targets.index(t, threadIdx.x) - vocab_begin;
    if (v >= 0 && v < V) target = targets.prob(t, threadIdx.x) * to_float(row[v]);
  }
  const float max = block_max(statistics.max, shared);
  statistics.rescale(max);
  const float sum = block_sum(statistics.sum, shared);
  target = block_sum(target, shared);
  if (threadIdx.x > 0) return;
  max_T[t] = max;
  sum_exp_T[t] = sum;
  target_T[t] = target;
}

__global__ void __launch_bounds__(256)
    rescale_sum_exp_kernel(const float* local_max_T, const float* max_T, int64_t T, float* sum_exp_T) {
  const int64_t t = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (t >= T || local_max_T[t] == max_T[t]) return;  // equal maxima may both be -infinity
  sum_exp_T[t] *= expf(local_max_T[t] - max_T[t]);
}

__global__ void __launch_bounds__(kTokens)
    cross_entropy_loss_kernel(Targets targets, const float* max_T, const float* sum_exp_T, const float* target_T,
                              int64_t T, float* lse_T, float* token_loss_T, double* partials) {
  __shared__ double shared[32];
  const int64_t t = int64_t{blockIdx.x} * kTokens + threadIdx.x;
  double loss = 0;
  if (t < T) {
    const double lse = max_T[t] + log(static_cast<double>(sum_exp_T[t]));
    lse_T[t] = static_cast<float>(lse);
    // An ignored token costs nothing even if its logits are not finite.
    const double weight = targets.weight(t);
    if (weight != 0) loss = weight * lse - target_T[t];
    if (token_loss_T) token_loss_T[t] = static_cast<float>(loss);
  }
  const double sum = block_sum(loss, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <class F>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_backward_kernel(Rows<F> logits_TV, int V, Targets targets, int64_t vocab_begin, const float* lse_T,
                                  const StepScalars* scalars, double factor) {
  const int64_t t = blockIdx.x;
  F* const row = logits_TV[t];
  const auto scale = static_cast<float>(scalars->in.loss_scale * factor);
  const float lse = lse_T[t], weight = targets.weight(t) * scale;
  const auto gradient = [=](F logit) { return weight == 0.0f ? 0.0f : quick_exp(to_float(logit) - lse) * weight; };

  // Thread k has alternative k: its gradient is rounded once, so that it is computed before the logit is gone.
  // Alternatives that name one token compute the same.
  int64_t target = -1;
  float target_gradient = 0.0f;
  if (static_cast<int>(threadIdx.x) < targets.K) {
    const int index = targets.index(t, threadIdx.x);
    target = index - vocab_begin;
    if (target >= 0 && target < V) {
      float prob = 0.0f;
#pragma unroll 4
      for (int k = 0; k < targets.K; ++k) prob += targets.index(t, k) == index ? targets.prob(t, k) : 0.0f;
      target_gradient = gradient(row[target]) - prob * scale;
    }
  }
  __syncthreads();

  const RowParts<F> parts(row, V);
  F* const body = row + parts.head;
  for (int v = threadIdx.x; v < parts.vectors; v += kInFlight * kThreads) {
    Vec<F> vectors[kInFlight];
    load_vectors(body, v, parts.vectors, vectors);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
#pragma unroll
      for (int i = 0; i < Vec<F>::kSize; ++i) vectors[j].at[i] = from_float<F>(gradient(vectors[j].at[i]));
      if (v + j * kThreads < parts.vectors) vectors[j].store(body + (v + j * kThreads) * Vec<F>::kSize);
    }
  }
  if (parts.single() >= 0) row[parts.single()] = from_float<F>(gradient(row[parts.single()]));
  __syncthreads();
  if (target >= 0 && target < V) row[target] = from_float<F>(weight == 0.0f ? 0.0f : target_gradient);
}

void expect_vocabulary(int64_t V, const char* op) {
  DSTRAIN_CHECK(V <= INT32_MAX - kThreads * 64, std::string(op) + ": a vocabulary of " + std::to_string(V));
}

}  // namespace

void CudaOps::cross_entropy_stats(Stream& stream, const Tensor& logits_TV, const CrossEntropyTargets& targets,
                                  int64_t vocab_begin, const Tensor& max_T, const Tensor& sum_exp_T,
                                  const Tensor& target_T) {
  const int64_t T = logits_TV.size(0), V = logits_TV.size(1);
  const Targets device_targets = targets_of(targets, T);
  expect(max_T, "cross_entropy_stats: max_T", DType::f32, {T});
  expect(sum_exp_T, "cross_entropy_stats: sum_exp_T", DType::f32, {T});
  expect(target_T, "cross_entropy_stats: target_T", DType::f32, {T});
  expect_vocabulary(V, "cross_entropy_stats");
  if (T == 0) return;
  dispatch_f(logits_TV.dtype(), "cross_entropy_stats", [&]<class F>() {
    cross_entropy_stats_kernel<F><<<static_cast<unsigned>(T), kThreads, 0, cuda(stream)>>>(
        rows_of<const F>(logits_TV), static_cast<int>(V), device_targets, vocab_begin, pointer<float>(max_T),
        pointer<float>(sum_exp_T), pointer<float>(target_T));
  });
  check_launch("cross_entropy_stats");
}

void CudaOps::rescale_sum_exp(Stream& stream, const Tensor& local_max_T, const Tensor& max_T,
                              const Tensor& sum_exp_T) {
  const int64_t T = sum_exp_T.size(0);
  expect(sum_exp_T, "rescale_sum_exp: sum_exp_T", DType::f32, {T});
  expect(local_max_T, "rescale_sum_exp: local_max_T", DType::f32, {T});
  expect(max_T, "rescale_sum_exp: max_T", DType::f32, {T});
  if (T == 0) return;
  rescale_sum_exp_kernel<<<static_cast<unsigned>(ceil_div(T, 256)), 256, 0, cuda(stream)>>>(
      pointer<const float>(local_max_T), pointer<const float>(max_T), T, pointer<float>(sum_exp_T));
  check_launch("rescale_sum_exp");
}

void CudaOps::cross_entropy_loss(Stream& stream, const CrossEntropyTargets& targets, const Tensor& max_T,
                                 const Tensor& sum_exp_T, const Tensor& target_T, const Tensor& lse_T,
                                 const Tensor& loss_sum_1, const Tensor& token_loss_T) {
  const int64_t T = max_T.size(0);
  const Targets device_targets = targets_of(targets, T);
  expect(max_T, "cross_entropy_loss: max_T", DType::f32, {T});
  expect(sum_exp_T, "cross_entropy_loss: sum_exp_T", DType::f32, {T});
  expect(target_T, "cross_entropy_loss: target_T", DType::f32, {T});
  expect(lse_T, "cross_entropy_loss: lse_T", DType::f32, {T});
  expect(loss_sum_1, "cross_entropy_loss: loss_sum_1", DType::f64, {1});
  if (token_loss_T.defined()) expect(token_loss_T, "cross_entropy_loss: token_loss_T", DType::f32, {T});
  if (T == 0) return;
  const int64_t blocks = ceil_div(T, kTokens);
  auto* const partials =
      ScratchPieces(stream, ScratchPieces::padded(8 * blocks)).take<double>(blocks);
  cross_entropy_loss_kernel<<<static_cast<unsigned>(blocks), kTokens, 0, cuda(stream)>>>(
      device_targets, pointer<const float>(max_T), pointer<const float>(sum_exp_T), pointer<const float>(target_T), T,
      pointer<float>(lse_T), pointer<float>(token_loss_T), partials);
  check_launch("cross_entropy_loss");
  add_partials(cuda(stream), partials, blocks, pointer<double>(loss_sum_1), "cross_entropy_loss");
}

void CudaOps::cross_entropy_backward(Stream& stream, const Tensor& logits_TV, const CrossEntropyTargets& targets,
                                     int64_t vocab_begin, const Tensor& lse_T, const StepScalars* scalars,
                                     double factor) {
  const int64_t T = logits_TV.size(0), V = logits_TV.size(1);
  const Targets device_targets = targets_of(targets, T);
  expect(lse_T, "cross_entropy_backward: lse_T", DType::f32, {T});
  expect_vocabulary(V, "cross_entropy_backward");
  if (T == 0) return;
  dispatch_f(logits_TV.dtype(), "cross_entropy_backward", [&]<class F>() {
    cross_entropy_backward_kernel<F><<<static_cast<unsigned>(T), kThreads, 0, cuda(stream)>>>(
        rows_of<F>(logits_TV), static_cast<int>(V), device_targets, vocab_begin, pointer<const float>(lse_T), scalars,
        factor);
  });
  check_launch("cross_entropy_backward");
}

}  // namespace dstrain
