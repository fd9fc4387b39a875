// Choice of experts, their weights and the gradient of both; the formulas are in core/backend/cpu_ops_router.cpp.
// T tokens, E experts, K experts per token, as many as router_limits.h allows. A warp has a token: its lane l holds experts l, l + 32,
// ... and, of what there is K of, number l.
#include "core/backend/expect.h"
#include "core/backend/routing.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"
#include "cuda/router_limits.h"
#include "cuda/rows.cuh"

namespace dstrain {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr unsigned kAllLanes = 0xffffffffu;

// RouterParams in a kernel's types.
struct Routing {
  int E, K, groups, groups_kept;
  bool sigmoid, best_two, normalize;
  float scale;
};

Routing routing_of(const RouterParams& params, int64_t E, const char* op) {
  expect_router(params, E, op);
  DSTRAIN_CHECK(E <= kMostExperts && params.experts_per_token <= kMostExpertsOfToken &&
                    params.groups <= kMostExpertGroups,
                std::string(op) + ": more experts, choices or groups than router_limits.h allows");
  Routing r;
  r.E = static_cast<int>(E);
  r.K = static_cast<int>(params.experts_per_token);
  r.groups = static_cast<int>(params.groups);
  r.groups_kept = static_cast<int>(params.groups_per_token);
  r.sigmoid = params.scoring == RouterScoring::sigmoid;
  r.best_two = params.group_score == GroupScore::best_two && E > params.groups;
  r.normalize = params.normalize;
  r.scale = static_cast<float>(params.scale);
  return r;
}

// Calls launch.template operator()<experts per lane>().
template <class Launch>
void dispatch_experts(int64_t E, const Launch& launch) {
  if (E <= 32) return launch.template operator()<1>();
  if (E <= 64) return launch.template operator()<2>();
  if (E <= 128) return launch.template operator()<4>();
  if (E <= 256) return launch.template operator()<8>();
  launch.template operator()<16>();
}

unsigned blocks_for(int64_t T) { return static_cast<unsigned>(ceil_div(T, kWarps)); }
__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }
__device__ __forceinline__ int64_t token_of_warp() { return int64_t{blockIdx.x} * kWarps + warp_id(); }

// Zero beyond E.
template <int kPerLane>
__device__ __forceinline__ void load_experts(const float* row_E, int E, float (&x)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = 32 * j + lane_id();
    x[j] = e < E ? row_E[e] : 0.0f;
  }
}
template <int kPerLane>
__device__ __forceinline__ void store_experts(const float (&x)[kPerLane], int E, float* row_E) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = 32 * j + lane_id();
    if (e < E) row_E[e] = x[j];
  }
}

// In place: logits become scores.
template <int kPerLane>
__device__ __forceinline__ void score(const Routing& r, float (&x)[kPerLane]) {
  if (r.sigmoid) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) x[j] = 1.0f / (1.0f + expf(-x[j]));
    return;
  }
  float max = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) max = 32 * j + lane_id() < r.E ? fmaxf(max, x[j]) : max;
  max = warp_max(max);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    x[j] = 32 * j + lane_id() < r.E ? expf(x[j] - max) : 0.0f;
    sum += x[j];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) x[j] /= sum;
}

// Integers in the order of the floats; a NaN counts as -infinity. 0 is below all.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x == x ? x : -INFINITY);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The groups whose experts may be chosen, as bits. Ties go to the lower group. choice_E holds no NaN.
__device__ __forceinline__ uint64_t kept_groups(const Routing& r, const float* choice_E) {
  const int size = r.E / r.groups;
  // Lanes per group, a power of two; with more than 32 groups each lane has two.
  int share = 1;
  while (2 * share * r.groups <= 32) share *= 2;
  uint32_t key[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int g = 32 * half + lane_id() / share;
    float best = -INFINITY, second = -INFINITY;
    if (g < r.groups && (half == 0 || r.groups > 32)) {
      for (int i = lane_id() % share; i < size; i += share) {
        const float choice = choice_E[g * size + i];
        second = fmaxf(second, fminf(best, choice));
        best = fmaxf(best, choice);
      }
    }
    for (int step = 1; step < share; step *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best, step);
      const float other_second = __shfl_xor_sync(kAllLanes, second, step);
      second = fmaxf(fminf(best, other), fmaxf(second, other_second));
      best = fmaxf(best, other);
    }
    key[half] = order_key(r.best_two ? best + second : best);
  }
  // A group is kept if fewer groups than that come before it.
  int before[2] = {0, 0};
  for (int g = 0; g < r.groups; ++g) {
    const uint32_t low = __shfl_sync(kAllLanes, key[0], g * share % 32);
    const uint32_t high = __shfl_sync(kAllLanes, key[1], g % 32);
    const uint32_t other = g < 32 ? low : high;
    const int own = lane_id() / share;
    before[0] += other > key[0] || (other == key[0] && g < own) ? 1 : 0;
    before[1] += other > key[1] || (other == key[1] && g < own + 32) ? 1 : 0;
  }
  const bool first = lane_id() % share == 0;
  const uint32_t low = __ballot_sync(kAllLanes, first && before[0] < r.groups_kept);
  const uint32_t high = __ballot_sync(kAllLanes, r.groups > 32 && before[1] < r.groups_kept);
  uint64_t kept = uint64_t{high} << 32;
  for (int g = 0; g < min(r.groups, 32); ++g) kept |= uint64_t{low >> (g * share) & 1u} << g;
  return kept;
}

// Gives lane k the weight of the k-th chosen expert, of which it holds the score (lanes from K on: 0).
__device__ __forceinline__ float weigh(const Routing& r, float score_k) {
  float sum = 0.0f;
  for (int k = 0; k < r.K; ++k) sum += __shfl_sync(kAllLanes, score_k, k);
  const float divisor = r.normalize ? sum + static_cast<float>(kTinyScore) : 1.0f;
  return score_k / divisor * r.scale;
}

template <int kPerLane>
__global__ void __launch_bounds__(32 * kWarps)
    router_topk_kernel(Rows<const float> logits_TE, const float* __restrict__ bias_E, Routing r, int64_t T,
                       Rows<float> scores_TE, Rows<int32_t> indices_TK, Rows<float> weights_TK) {
  __shared__ float choices[kWarps][32 * kPerLane];
  const int64_t t = token_of_warp();
  if (t >= T) return;
  float scores[kPerLane], choice[kPerLane];
  uint32_t key[kPerLane];
  load_experts(logits_TE[t], r.E, scores);
  score(r, scores);
  store_experts(scores, r.E, scores_TE[t]);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = 32 * j + lane_id();
    choice[j] = scores[j] + (bias_E && e < r.E ? bias_E[e] : 0.0f);
    key[j] = e < r.E ? order_key(choice[j]) : 0u;
  }
  if (r.groups_kept < r.groups) {
    float* const row = choices[warp_id()];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) row[32 * j + lane_id()] = choice[j] == choice[j] ? choice[j] : -INFINITY;
    __syncwarp();
    const uint64_t kept = kept_groups(r, row);
    const int size = r.E / r.groups;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = 32 * j + lane_id();
      if (e < r.E && !(kept >> (e / size) & 1u)) key[j] = 0u;
    }
  }
  int expert_k = 0;
  float score_k = 0.0f;
  for (int k = 0; k < r.K; ++k) {
    uint32_t best = 0u;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) best = max(best, key[j]);
    best = __reduce_max_sync(kAllLanes, best);
    unsigned expert = 0xffffffffu;
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j) expert = key[j] == best ? 32 * j + lane_id() : expert;
    expert = __reduce_min_sync(kAllLanes, expert);
    float chosen = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (32 * j + lane_id() == static_cast<int>(expert)) {
        chosen = scores[j];
        key[j] = 0u;
      }
    }
    chosen = __shfl_sync(kAllLanes, chosen, expert % 32);
    if (lane_id() == k) {
      expert_k = static_cast<int>(expert);
      score_k = chosen;
    }
  }
  const float weight = weigh(r, score_k);
  if (lane_id() < r.K) {
    indices_TK[t][lane_id()] = expert_k;
    weights_TK[t][lane_id()] = weight;
  }
}

template <int kPerLane>
__global__ void __launch_bounds__(32 * kWarps)
    router_weights_kernel(Rows<const float> logits_TE, Routing r, Rows<const int32_t> indices_TK, int64_t T,
                          Rows<float> scores_TE, Rows<float> weights_TK) {
  __shared__ float rows[kWarps][32 * kPerLane];
  const int64_t t = token_of_warp();
  if (t >= T) return;
  const int expert_k = lane_id() < r.K ? checked_index(indices_TK[t][lane_id()], r.E) : 0;
  float scores[kPerLane];
  load_experts(logits_TE[t], r.E, scores);
  score(r, scores);
  store_experts(scores, r.E, scores_TE[t]);
  store_experts(scores, r.E, rows[warp_id()]);
  __syncwarp();
  const float weight = weigh(r, rows[warp_id()][expert_k]);
  if (lane_id() < r.K) weights_TK[t][lane_id()] = weight;
}

// dscores = d/d(scores) of sum_e coeff_e scores_e / sum(scores).
template <int kPerLane>
__device__ __forceinline__ void balance_backward(const float (&scores)[kPerLane], const float (&coeff)[kPerLane],
                                                 float (&dscores)[kPerLane]) {
  float sum = 0.0f, dot = 0.0f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    sum += scores[j];
    dot += scores[j] * coeff[j];
  }
  sum = warp_sum(sum) + static_cast<float>(kTinyScore);
  const float mean = warp_sum(dot) / sum, inverse = 1.0f / sum;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) dscores[j] = (coeff[j] - mean) * inverse;
}

// d(scores of the chosen): lane k gets that of choice k.
__device__ __forceinline__ float weigh_backward(const Routing& r, float score_k, float dweight_k) {
  if (!r.normalize) return r.scale * dweight_k;
  const float sum = warp_sum(lane_id() < r.K ? score_k : 0.0f) + static_cast<float>(kTinyScore);
  const float mean = warp_sum(lane_id() < r.K ? score_k * dweight_k : 0.0f) / sum;
  return r.scale * (dweight_k - mean) / sum;
}

template <int kPerLane>
__global__ void __launch_bounds__(32 * kWarps)
    router_backward_kernel(Rows<const float> dweights_TK, Rows<const float> scores_TE,
                           Rows<const int32_t> indices_TK, Routing r, Rows<const float> coeff_SE,
                           RowsOfSequences rows_of_sequences, int64_t T, Rows<float> dlogits_TE) {
  __shared__ float rows[kWarps][32 * kPerLane];
  const int64_t t = token_of_warp();
  if (t >= T) return;
  const bool has_choice = lane_id() < r.K;
  const int expert_k = has_choice ? checked_index(indices_TK[t][lane_id()], r.E) : 0;
  const float dweight_k = has_choice ? dweights_TK[t][lane_id()] : 0.0f;
  float scores[kPerLane], dscores[kPerLane] = {};
  load_experts(scores_TE[t], r.E, scores);
  if (coeff_SE.data) {
    float coeff[kPerLane];
    load_experts(coeff_SE[(rows_of_sequences.first_row + t) / rows_of_sequences.rows_per_sequence], r.E, coeff);
    balance_backward(scores, coeff, dscores);
  }
  store_experts(scores, r.E, rows[warp_id()]);
  __syncwarp();
  const float dscore_k = weigh_backward(r, rows[warp_id()][expert_k], dweight_k);
  for (int k = 0; k < r.K; ++k) {
    const int expert = __shfl_sync(kAllLanes, expert_k, k);
    const float dscore = __shfl_sync(kAllLanes, dscore_k, k);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) dscores[j] += 32 * j + lane_id() == expert ? dscore : 0.0f;
  }
  if (r.sigmoid) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) dscores[j] = dscores[j] * scores[j] * (1.0f - scores[j]);
  } else {
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) dot += dscores[j] * scores[j];  // scores beyond E are 0
    dot = warp_sum(dot);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) dscores[j] = scores[j] * (dscores[j] - dot);
  }
  store_experts(dscores, r.E, dlogits_TE[t]);
}

}  // namespace

void CudaOps::router_topk(Stream& stream, const Tensor& logits_TE, const Tensor& bias_E,
                          const RouterParams& params, const Tensor& scores_TE, const Tensor& indices_TK,
                          const Tensor& weights_TK) {
  const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = params.experts_per_token;
  const Routing routing = routing_of(params, E, "router_topk");
  expect_strided(logits_TE, "router_topk: logits_TE", DType::f32, {T, E});
  if (bias_E.defined()) expect(bias_E, "router_topk: bias_E", DType::f32, {E});
  expect_strided(scores_TE, "router_topk: scores_TE", DType::f32, {T, E});
  expect_strided(indices_TK, "router_topk: indices_TK", DType::i32, {T, K});
  expect_strided(weights_TK, "router_topk: weights_TK", DType::f32, {T, K});
  if (T == 0) return;
  dispatch_experts(E, [&]<int kPerLane>() {
    router_topk_kernel<kPerLane><<<blocks_for(T), 32 * kWarps, 0, cuda(stream)>>>(
        rows_of<const float>(logits_TE), pointer<const float>(bias_E), routing, T, rows_of<float>(scores_TE),
        rows_of<int32_t>(indices_TK), rows_of<float>(weights_TK));
  });
  check_launch("router_topk");
}

void CudaOps::router_weights(Stream& stream, const Tensor& logits_TE, const RouterParams& params,
                             const Tensor& indices_TK, const Tensor& scores_TE, const Tensor& weights_TK) {
  const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = params.experts_per_token;
  const Routing routing = routing_of(params, E, "router_weights");
  expect_strided(logits_TE, "router_weights: logits_TE", DType::f32, {T, E});
  expect_strided(indices_TK, "router_weights: indices_TK", DType::i32, {T, K});
  expect_strided(scores_TE, "router_weights: scores_TE", DType::f32, {T, E});
  expect_strided(weights_TK, "router_weights: weights_TK", DType::f32, {T, K});
  if (T == 0) return;
  dispatch_experts(E, [&]<int kPerLane>() {
    router_weights_kernel<kPerLane><<<blocks_for(T), 32 * kWarps, 0, cuda(stream)>>>(
        rows_of<const float>(logits_TE), routing, rows_of<const int32_t>(indices_TK), T, rows_of<float>(scores_TE),
        rows_of<float>(weights_TK));
  });
  check_launch("router_weights");
}

void CudaOps::router_backward(Stream& stream, const Tensor& dweights_TK, const Tensor& scores_TE,
                              const Tensor& indices_TK, const RouterParams& params,
                              const Tensor& balance_coeff_SE, const RowsOfSequences& rows,
                              const Tensor& dlogits_TE) {
  const int64_t T = scores_TE.size(0), E = scores_TE.size(1), K = params.experts_per_token;
  const Routing routing = routing_of(params, E, "router_backward");
  expect_strided(dweights_TK, "router_backward: dweights_TK", DType::f32, {T, K});
  expect_strided(scores_TE, "router_backward: scores_TE", DType::f32, {T, E});
  expect_strided(indices_TK, "router_backward: indices_TK", DType::i32, {T, K});
  expect_strided(dlogits_TE, "router_backward: dlogits_TE", DType::f32, {T, E});
  if (T == 0) return;
  if (balance_coeff_SE.defined()) {
    const int64_t S = balance_coeff_SE.size(0);
    expect_strided(balance_coeff_SE, "router_backward: balance_coeff_SE", DType::f32, {S, E});
    expect_rows(rows, T, S, "router_backward");
  }
  dispatch_experts(E, [&]<int kPerLane>() {
    router_backward_kernel<kPerLane><<<blocks_for(T), 32 * kWarps, 0, cuda(stream)>>>(
        rows_of<const float>(dweights_TK), rows_of<const float>(scores_TE), rows_of<const int32_t>(indices_TK),
        routing, rows_of<const float>(balance_coeff_SE), rows, T, rows_of<float>(dlogits_TE));
  });
  check_launch("router_backward");
}

}  // namespace dstrain
