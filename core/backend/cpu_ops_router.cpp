// Choice of experts and its gradient. With scores s = sigmoid(logits) (DeepSeek-V3,
// arXiv:2412.19437) or softmax(logits) (V2, arXiv:2405.04434):
//   choice c = s + bias;  a group's score is its best or the sum of its two best c;
//   the best K of c among the experts of the best groups are chosen;
//   weight_k = scale * s_k / (sum of chosen s + 1e-20), or scale * s_k if not normalised.
// T tokens, E experts, K experts per token. A NaN counts as -infinity when choosing, so that
// indices stay in range and distinct.
#include <limits>

#include "core/backend/cpu_ops.h"
#include "core/backend/cpu_routing.h"
#include "core/backend/simd_math.h"

namespace dstrain {
namespace {

// The largest values offered so far, in descending order; of equal ones the first offered stands
// first.
template <class F>
class BestList {
 public:
  // `values` and `indices` have room for `capacity` >= 1 entries.
  BestList(int64_t capacity, F* values, int32_t* indices)
      : capacity_(capacity), values_(values), indices_(indices) {}

  void offer(F value, int64_t index) {
    value = value == value ? value : -std::numeric_limits<F>::infinity();
    if (size_ == capacity_) {
      if (!(value > values_[size_ - 1])) return;
      --size_;
    }
    int64_t at = size_++;
    for (; at > 0 && value > values_[at - 1]; --at) {
      values_[at] = values_[at - 1];
      indices_[at] = indices_[at - 1];
    }
    values_[at] = value;
    indices_[at] = static_cast<int32_t>(index);
  }
  int64_t size() const { return size_; }
  F value(int64_t i) const { return values_[i]; }
  int32_t index(int64_t i) const { return indices_[i]; }

 private:
  int64_t capacity_, size_ = 0;
  F* values_;
  int32_t* indices_;
};

// What one task needs to choose experts, cut from its thread's scratch memory.
template <class F>
struct ChoiceScratch {
  F* choice_E;
  F* best_values;
  F* group_values;
  int32_t* group_indices;
  bool* group_kept;

  ChoiceScratch(void* memory, int64_t experts, const RouterParams& params) {
    choice_E = static_cast<F*>(memory);
    best_values = choice_E + experts;
    group_values = best_values + params.experts_per_token;
    group_indices = reinterpret_cast<int32_t*>(group_values + params.groups);
    group_kept = reinterpret_cast<bool*>(group_indices + params.groups);
  }
  static int64_t bytes(int64_t experts, const RouterParams& params) {
    return (experts + params.experts_per_token + params.groups) * static_cast<int64_t>(sizeof(F)) +
           params.groups * static_cast<int64_t>(sizeof(int32_t) + sizeof(bool));
  }
};

template <class F>
void score_row(RouterScoring scoring, const F* logits, int64_t E, F* scores) {
  if (scoring == RouterScoring::sigmoid) {
#pragma omp simd
    for (int64_t e = 0; e < E; ++e) scores[e] = sigmoid(logits[e]);
    return;
  }
  F max = -std::numeric_limits<F>::infinity();
  for (int64_t e = 0; e < E; ++e) max = logits[e] > max ? logits[e] : max;
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) scores[e] = fast_exp(logits[e] - max);
  const F sum = lane_sum<F>(E, [scores](int64_t e) { return scores[e]; });
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) scores[e] /= sum;
}

template <class F>
F group_score(GroupScore kind, const F* choice, int64_t size) {
  F values[2];
  int32_t indices[2];
  BestList<F> best(kind == GroupScore::best_two && size > 1 ? 2 : 1, values, indices);
  for (int64_t i = 0; i < size; ++i) best.offer(choice[i], i);
  return best.size() == 2 ? best.value(0) + best.value(1) : best.value(0);
}

template <class F>
void choose_experts(const RouterParams& params, int64_t E, const ChoiceScratch<F>& scratch,
                    int32_t* indices_K) {
  const F* choice_E = scratch.choice_E;
  BestList<F> best(params.experts_per_token, scratch.best_values, indices_K);
  if (params.groups_per_token == params.groups) {
    for (int64_t e = 0; e < E; ++e) best.offer(choice_E[e], e);
    return;
  }
  const int64_t size = E / params.groups;
  BestList<F> best_groups(params.groups_per_token, scratch.group_values, scratch.group_indices);
  for (int64_t g = 0; g < params.groups; ++g) {
    best_groups.offer(group_score(params.group_score, choice_E + g * size, size), g);
    scratch.group_kept[g] = false;
  }
  for (int64_t i = 0; i < best_groups.size(); ++i) scratch.group_kept[best_groups.index(i)] = true;
  for (int64_t g = 0; g < params.groups; ++g) {
    if (!scratch.group_kept[g]) continue;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) best.offer(choice_E[e], e);
  }
}

template <class F>
void weigh_row(const RouterParams& params, const F* scores_E, int64_t E, const int32_t* indices_K,
               F* weights_K) {
  const int64_t K = params.experts_per_token;
  F sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += scores_E[checked_expert(indices_K[k], E)];
  const F divisor = params.normalize ? sum + static_cast<F>(kTinyScore) : F(1);
  for (int64_t k = 0; k < K; ++k) {
    weights_K[k] = scores_E[indices_K[k]] / divisor * static_cast<F>(params.scale);
  }
}

// Adds d(weights)/d(scores) times dweights to dscores.
template <class F>
void weigh_row_backward(const RouterParams& params, const F* scores_E, const int32_t* indices_K,
                        const F* dweights_K, F* dscores_E) {
  const int64_t K = params.experts_per_token;
  const F scale = static_cast<F>(params.scale);
  if (!params.normalize) {
    for (int64_t k = 0; k < K; ++k) dscores_E[indices_K[k]] += scale * dweights_K[k];
    return;
  }
  F sum = static_cast<F>(kTinyScore), dot = 0;
  for (int64_t k = 0; k < K; ++k) {
    sum += scores_E[indices_K[k]];
    dot += scores_E[indices_K[k]] * dweights_K[k];
  }
  const F mean = dot / sum;
  for (int64_t k = 0; k < K; ++k) {
    dscores_E[indices_K[k]] += scale * (dweights_K[k] - mean) / sum;
  }
}

// dscores = d/d(scores) of sum_e coeff_e scores_e / sum(scores).
template <class F>
void balance_row_backward(const F* scores_E, const F* coeff_E, int64_t E, F* dscores_E) {
  const F sum = lane_sum<F>(E, [=](int64_t e) { return scores_E[e]; }) + static_cast<F>(kTinyScore);
  const F dot = lane_sum<F>(E, [=](int64_t e) { return scores_E[e] * coeff_E[e]; });
  const F mean = dot / sum, inverse = 1 / sum;
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) dscores_E[e] = (coeff_E[e] - mean) * inverse;
}

template <class F>
void score_row_backward(RouterScoring scoring, const F* scores_E, const F* dscores_E, int64_t E,
                        F* dlogits_E) {
  if (scoring == RouterScoring::sigmoid) {
#pragma omp simd
    for (int64_t e = 0; e < E; ++e) {
      dlogits_E[e] = dscores_E[e] * scores_E[e] * (F(1) - scores_E[e]);
    }
    return;
  }
  const F dot = lane_sum<F>(E, [=](int64_t e) { return dscores_E[e] * scores_E[e]; });
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) dlogits_E[e] = scores_E[e] * (dscores_E[e] - dot);
}

}  // namespace

void CpuOps::router_topk(Stream&, const Tensor& logits_TE, const Tensor& bias_E,
                         const RouterParams& params, const Tensor& scores_TE,
                         const Tensor& indices_TK, const Tensor& weights_TK) {
  const DType dtype = logits_TE.dtype();
  const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = params.experts_per_token;
  expect_router(params, E, "router_topk");
  if (bias_E.defined()) expect(bias_E, "router_topk: bias_E", dtype, {E});
  expect_strided(scores_TE, "router_topk: scores_TE", dtype, {T, E});
  expect_strided(indices_TK, "router_topk: indices_TK", DType::i32, {T, K});
  expect_strided(weights_TK, "router_topk: weights_TK", dtype, {T, K});
  dispatch_float(dtype, [&]<class F>() {
    DSTRAIN_CHECK(ChoiceScratch<F>::bytes(E, params) <= pool_.scratch_bytes(),
                  "router_topk: too many experts for the scratch memory of a thread");
    const int64_t grain = rows_per_task(8 * E);
    pool_.run((T + grain - 1) / grain, [&](int64_t task, void* memory) {
      const ChoiceScratch<F> scratch(memory, E, params);
      for (int64_t t = task * grain; t < std::min(T, (task + 1) * grain); ++t) {
        F* const scores = row<F>(scores_TE, t);
        score_row(params.scoring, row<F>(logits_TE, t), E, scores);
        const F* const bias = bias_E.defined() ? bias_E.data<F>() : nullptr;
        for (int64_t e = 0; e < E; ++e) {
          scratch.choice_E[e] = bias ? scores[e] + bias[e] : scores[e];
        }
        int32_t* const indices = row<int32_t>(indices_TK, t);
        choose_experts(params, E, scratch, indices);
        weigh_row(params, scores, E, indices, row<F>(weights_TK, t));
      }
    });
  });
}

void CpuOps::router_weights(Stream&, const Tensor& logits_TE, const RouterParams& params,
                            const Tensor& indices_TK, const Tensor& scores_TE,
                            const Tensor& weights_TK) {
  const DType dtype = logits_TE.dtype();
  const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = params.experts_per_token;
  expect_router(params, E, "router_weights");
  expect_strided(indices_TK, "router_weights: indices_TK", DType::i32, {T, K});
  expect_strided(scores_TE, "router_weights: scores_TE", dtype, {T, E});
  expect_strided(weights_TK, "router_weights: weights_TK", dtype, {T, K});
  dispatch_float(dtype, [&]<class F>() {
    pool_.run_ranges(T, rows_per_task(4 * E), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        score_row(params.scoring, row<F>(logits_TE, t), E, row<F>(scores_TE, t));
        weigh_row(params, row<F>(scores_TE, t), E, row<int32_t>(indices_TK, t),
                  row<F>(weights_TK, t));
      }
    });
  });
}

void CpuOps::router_backward(Stream&, const Tensor& dweights_TK, const Tensor& scores_TE,
                             const Tensor& indices_TK, const RouterParams& params,
                             const Tensor& balance_coeff_SE, const RowsOfSequences& rows,
                             const Tensor& dlogits_TE) {
  const DType dtype = scores_TE.dtype();
  const int64_t T = scores_TE.size(0), E = scores_TE.size(1), K = params.experts_per_token;
  expect_router(params, E, "router_backward");
  expect_strided(dweights_TK, "router_backward: dweights_TK", dtype, {T, K});
  expect_strided(indices_TK, "router_backward: indices_TK", DType::i32, {T, K});
  expect_strided(dlogits_TE, "router_backward: dlogits_TE", dtype, {T, E});
  if (T == 0) return;
  if (balance_coeff_SE.defined()) {
    const int64_t S = balance_coeff_SE.size(0);
    expect_strided(balance_coeff_SE, "router_backward: balance_coeff_SE", dtype, {S, E});
    expect_rows(rows, T, S, "router_backward");
  }
  dispatch_float(dtype, [&]<class F>() {
    pool_.run_ranges(T, rows_per_task(4 * E), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const F* const scores = row<F>(scores_TE, t);
        F* const dlogits = row<F>(dlogits_TE, t);  // holds d(scores) first
        if (balance_coeff_SE.defined()) {
          const F* const coeff = row<F>(balance_coeff_SE, (rows.first_row + t) / rows.rows_per_sequence);
          balance_row_backward(scores, coeff, E, dlogits);
        } else {
          std::fill(dlogits, dlogits + E, F(0));
        }
        weigh_row_backward(params, scores, row<int32_t>(indices_TK, t), row<F>(dweights_TK, t),
                           dlogits);
        score_row_backward(params.scoring, scores, dlogits, E, dlogits);
      }
    });
  });
}

}  // namespace dstrain
