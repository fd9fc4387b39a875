// Cross-entropy over a slice of the vocabulary, in place of the logits.
//   lse = log sum_v exp(logit_v), token loss = w lse - sum_v q_v logit_v, w = sum_v q_v
//   dlogit_v = (w softmax_v - q_v) * loss_scale * factor
// q is the target distribution: 1 at a hard target, 0 everywhere for an ignored token.
// T tokens, V logits of a token held here, K alternatives of a soft target.
// Statistics read a row once: block by block, each first for its largest value and then, from the
// first-level cache, for its exponentials. Block sums are F, their total is double.
#include <cmath>
#include <limits>

#include "core/backend/cpu_ops.h"
#include "core/backend/simd_math.h"

namespace dstrain {
namespace {

constexpr int64_t kBlock = 2048;

// Exponentials cost about as much as four plain elements.
int64_t loss_rows_per_task(int64_t V) {
  return rows_per_task(4 * V);
}

template <class F>
F largest(const F* x, int64_t n) {
  F max = -std::numeric_limits<F>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

template <class F>
struct RowStatistics {
  F max = -std::numeric_limits<F>::infinity();
  double sum_exp = 0;

  // Keeps sum_exp relative to the largest value so far. -infinity everywhere sums to 0.
  void add(const F* x, int64_t n) {
    const F block_max = largest(x, n);
    if (block_max > max) {
      sum_exp *= std::exp(static_cast<double>(max) - static_cast<double>(block_max));
      max = block_max;
    }
    const F shift = max == -std::numeric_limits<F>::infinity() ? F(0) : max;
    sum_exp +=
        static_cast<double>(lane_sum<F>(n, [=](int64_t i) { return fast_exp(x[i] - shift); }));
  }
};

// The target distribution of token t: calls use(index relative to vocab_begin, probability) for
// each alternative, whether its logit is held here or not.
template <class F, class Use>
void for_each_target(const CrossEntropyTargets& targets, int64_t t, int64_t vocab_begin,
                     const Use& use) {
  if (targets.hard_T.defined()) {
    const int64_t target = targets.hard_T.data<int32_t>()[t];
    if (target >= 0) use(target - vocab_begin, F(1));
    return;
  }
  const int32_t* index = row<int32_t>(targets.soft_index_TK, t);
  const F* prob = row<F>(targets.soft_prob_TK, t);
  for (int64_t k = 0; k < targets.soft_index_TK.size(1); ++k) use(index[k] - vocab_begin, prob[k]);
}

template <class F>
F target_weight(const CrossEntropyTargets& targets, int64_t t) {
  F weight = 0;
  for_each_target<F>(targets, t, 0, [&](int64_t, F prob) { weight += prob; });
  return weight;
}

void expect_targets(const CrossEntropyTargets& targets, DType dtype, int64_t T) {
  const bool hard = targets.hard_T.defined();
  DSTRAIN_CHECK(hard != targets.soft_index_TK.defined() &&
                    targets.soft_index_TK.defined() == targets.soft_prob_TK.defined(),
                "cross_entropy: either hard or soft targets");
  if (hard) return expect(targets.hard_T, "cross_entropy: hard_T", DType::i32, {T});
  const int64_t K = targets.soft_index_TK.size(1);
  expect_strided(targets.soft_index_TK, "cross_entropy: soft_index_TK", DType::i32, {T, K});
  expect_strided(targets.soft_prob_TK, "cross_entropy: soft_prob_TK", dtype, {T, K});
}

}  // namespace

void CpuOps::cross_entropy_stats(Stream&, const Tensor& logits_TV,
                                 const CrossEntropyTargets& targets, int64_t vocab_begin,
                                 const Tensor& max_T, const Tensor& sum_exp_T,
                                 const Tensor& target_T) {
  const DType dtype = logits_TV.dtype();
  const int64_t T = logits_TV.size(0), V = logits_TV.size(1);
  expect_targets(targets, dtype, T);
  expect(max_T, "cross_entropy_stats: max_T", dtype, {T});
  expect(sum_exp_T, "cross_entropy_stats: sum_exp_T", dtype, {T});
  expect(target_T, "cross_entropy_stats: target_T", dtype, {T});
  dispatch_float(dtype, [&]<class F>() {
    pool_.run_ranges(T, loss_rows_per_task(V), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const F* const logits = row<F>(logits_TV, t);
        RowStatistics<F> statistics;
        for (int64_t v = 0; v < V; v += kBlock) {
          statistics.add(logits + v, std::min(kBlock, V - v));
        }
        F target = 0;
        for_each_target<F>(targets, t, vocab_begin, [&](int64_t v, F prob) {
          if (v >= 0 && v < V) target += prob * logits[v];
        });
        max_T.data<F>()[t] = statistics.max;
        sum_exp_T.data<F>()[t] = static_cast<F>(statistics.sum_exp);
        target_T.data<F>()[t] = target;
      }
    });
  });
}

void CpuOps::rescale_sum_exp(Stream&, const Tensor& local_max_T, const Tensor& max_T,
                             const Tensor& sum_exp_T) {
  const DType dtype = sum_exp_T.dtype();
  const int64_t T = sum_exp_T.size(0);
  expect(local_max_T, "rescale_sum_exp: local_max_T", dtype, {T});
  expect(max_T, "rescale_sum_exp: max_T", dtype, {T});
  dispatch_float(dtype, [&]<class F>() {
    pool_.run_ranges(T, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const F local = local_max_T.data<F>()[t], max = max_T.data<F>()[t];
        // Equal maxima may both be -infinity.
        if (local != max) sum_exp_T.data<F>()[t] *= fast_exp(local - max);
      }
    });
  });
}

void CpuOps::cross_entropy_loss(Stream&, const CrossEntropyTargets& targets, const Tensor& max_T,
                                const Tensor& sum_exp_T, const Tensor& target_T,
                                const Tensor& lse_T, const Tensor& loss_sum_1,
                                const Tensor& token_loss_T) {
  const DType dtype = max_T.dtype();
  const int64_t T = max_T.size(0);
  expect_targets(targets, dtype, T);
  expect(sum_exp_T, "cross_entropy_loss: sum_exp_T", dtype, {T});
  expect(target_T, "cross_entropy_loss: target_T", dtype, {T});
  expect(lse_T, "cross_entropy_loss: lse_T", dtype, {T});
  expect(loss_sum_1, "cross_entropy_loss: loss_sum_1", DType::f64, {1});
  if (token_loss_T.defined()) {
    expect(token_loss_T, "cross_entropy_loss: token_loss_T", dtype, {T});
  }
  dispatch_float(dtype, [&]<class F>() {
    const RowChunks chunks(T, sizeof(double), /*min_rows=*/512);
    double* const partials = workspace_.get<double>(chunks.count);
    pool_.run(chunks.count, [&](int64_t chunk, void*) {
      double sum = 0;
      for (int64_t t = chunks.begin(chunk); t < chunks.end(chunk); ++t) {
        const double lse = max_T.data<F>()[t] + std::log(double{sum_exp_T.data<F>()[t]});
        lse_T.data<F>()[t] = static_cast<F>(lse);
        // An ignored token costs nothing even if its logits are not finite.
        const double weight = target_weight<F>(targets, t);
        const double loss = weight == 0 ? 0 : weight * lse - target_T.data<F>()[t];
        if (token_loss_T.defined()) token_loss_T.data<F>()[t] = static_cast<F>(loss);
        sum += loss;
      }
      partials[chunk] = sum;
    });
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      *loss_sum_1.data<double>() += partials[chunk];
    }
  });
}

void CpuOps::cross_entropy_backward(Stream&, const Tensor& logits_TV,
                                    const CrossEntropyTargets& targets, int64_t vocab_begin,
                                    const Tensor& lse_T, const StepScalars* scalars,
                                    double factor) {
  const DType dtype = logits_TV.dtype();
  const int64_t T = logits_TV.size(0), V = logits_TV.size(1);
  expect_targets(targets, dtype, T);
  expect(lse_T, "cross_entropy_backward: lse_T", dtype, {T});
  dispatch_float(dtype, [&]<class F>() {
    const F scale = static_cast<F>(scalars->in.loss_scale * factor);
    pool_.run_ranges(T, loss_rows_per_task(V), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        F* const logits = row<F>(logits_TV, t);
        const F lse = lse_T.data<F>()[t], weight = target_weight<F>(targets, t) * scale;
        if (weight == 0) {
          std::fill(logits, logits + V, F(0));
          continue;
        }
#pragma omp simd
        for (int64_t v = 0; v < V; ++v) logits[v] = fast_exp(logits[v] - lse) * weight;
        for_each_target<F>(targets, t, vocab_begin, [&](int64_t v, F prob) {
          if (v >= 0 && v < V) logits[v] -= prob * scale;
        });
      }
    });
  });
}

}  // namespace dstrain
