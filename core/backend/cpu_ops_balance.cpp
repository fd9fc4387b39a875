// Load balance of experts: the sequence-wise loss of DeepSeek-V3 (arXiv:2412.19437, eq. 17-20),
// counts of choices, and the bias that steers them without a loss (arXiv:2408.15664). T tokens in S
// sequences of equal length, E experts, K experts per token.
#include "core/backend/cpu_ops.h"
#include "core/backend/cpu_routing.h"

namespace dstrain {
namespace {

// load += choices per expert, prob += scores / sum(scores), over tokens [begin, end).
template <class F>
void add_statistics(const Tensor& scores_TE, const Tensor& indices_TK, int64_t begin, int64_t end,
                    F* load_E, F* prob_E) {
  const int64_t E = scores_TE.size(1), K = indices_TK.size(1);
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* indices = row<int32_t>(indices_TK, t);
    for (int64_t k = 0; k < K; ++k) load_E[indices[k]] += F(1);
    const F* scores = row<F>(scores_TE, t);
    const F sum = lane_sum<F>(E, [scores](int64_t e) { return scores[e]; });
    const F inverse = 1 / (sum + static_cast<F>(kTinyScore));
#pragma omp simd
    for (int64_t e = 0; e < E; ++e) prob_E[e] += scores[e] * inverse;
  }
}

}  // namespace

void CpuOps::balance_statistics(Stream&, const Tensor& scores_TE, const Tensor& indices_TK,
                                const RowsOfSequences& rows, const Tensor& load_SE,
                                const Tensor& prob_SE) {
  const DType dtype = scores_TE.dtype();
  const int64_t T = scores_TE.size(0), E = scores_TE.size(1), S = load_SE.size(0);
  expect_strided(indices_TK, "balance_statistics: indices_TK", DType::i32, {T, indices_TK.size(1)});
  expect(load_SE, "balance_statistics: load_SE", dtype, {S, E});
  expect(prob_SE, "balance_statistics: prob_SE", dtype, {S, E});
  if (S == 0) return;
  expect_rows(rows, T, S, "balance_statistics");
  dispatch_float(dtype, [&]<class F>() {
    // One row of partial results holds load, then prob. Sequences share the workspace in turns.
    const int64_t n = rows.rows_per_sequence, stride = partial_stride<F>(2 * E);
    const RowChunks chunks(n, stride * static_cast<int64_t>(sizeof(F)), /*min_rows=*/128);
    const int64_t per_sequence = std::max<int64_t>(1, chunks.count) * stride;
    const int64_t at_once = std::clamp<int64_t>(
        Workspace::kBytes / (per_sequence * static_cast<int64_t>(sizeof(F))), 1, S);
    F* const partials = workspace_.get<F>(at_once * per_sequence);
    for (int64_t first = 0; first < S; first += at_once) {
      const int64_t sequences = std::min(at_once, S - first);
      pool_.run(sequences * chunks.count, [&](int64_t task, void*) {
        const int64_t s = task / chunks.count, chunk = task % chunks.count;
        F* const partial = partials + s * per_sequence + chunk * stride;
        std::fill(partial, partial + 2 * E, F(0));
        const int64_t token = (first + s) * n - rows.first_row;  // of the sequence's first row
        add_statistics(scores_TE, indices_TK, std::clamp<int64_t>(token + chunks.begin(chunk), 0, T),
                       std::clamp<int64_t>(token + chunks.end(chunk), 0, T), partial, partial + E);
      });
      for (int64_t s = 0; s < sequences; ++s) {
        const F* const partial = partials + s * per_sequence;
        sum_partials(pool_, partial, chunks.count, stride, E, Accumulate::overwrite,
                     row<F>(load_SE, first + s));
        sum_partials(pool_, partial + E, chunks.count, stride, E, Accumulate::overwrite,
                     row<F>(prob_SE, first + s));
      }
    }
  });
}

void CpuOps::balance_loss(Stream&, const Tensor& load_SE, const Tensor& prob_SE,
                          int64_t tokens_per_sequence, int64_t experts_per_token, double alpha,
                          const Tensor& loss_1, const Tensor& coeff_SE) {
  const DType dtype = load_SE.dtype();
  const int64_t S = load_SE.size(0), E = load_SE.size(1);
  expect(prob_SE, "balance_loss: prob_SE", dtype, {S, E});
  expect(loss_1, "balance_loss: loss_1", DType::f64, {1});
  expect(coeff_SE, "balance_loss: coeff_SE", dtype, {S, E});
  if (S == 0 || tokens_per_sequence == 0) return;
  const double n = static_cast<double>(tokens_per_sequence);
  const double load_scale = static_cast<double>(E) / (static_cast<double>(experts_per_token) * n);
  dispatch_float(dtype, [&]<class F>() {
    double loss = 0;
    for (int64_t i = 0; i < S * E; ++i) {
      const double coeff = alpha * load_scale * static_cast<double>(load_SE.data<F>()[i]) / n;
      coeff_SE.data<F>()[i] = static_cast<F>(coeff);
      loss += coeff * static_cast<double>(prob_SE.data<F>()[i]);
    }
    *loss_1.data<double>() += loss;
  });
}

void CpuOps::count_experts(Stream&, const Tensor& indices_TK, const Tensor& counts_E) {
  const int64_t E = counts_E.numel();
  expect(counts_E, "count_experts: counts_E", DType::i64, {E});
  const ExpertCounts counts(pool_, workspace_, indices_TK, E);
  int64_t* const totals = counts_E.data<int64_t>();
  for (int64_t chunk = 0; chunk < counts.chunks(); ++chunk) {
    for (int64_t e = 0; e < E; ++e) totals[e] += counts.of_chunk(chunk)[e];
  }
}

void CpuOps::router_bias_update(Stream&, const Tensor& counts_E, double speed,
                                const StepScalars* scalars, const Tensor& bias_E) {
  const int64_t E = counts_E.numel();
  expect(counts_E, "router_bias_update: counts_E", DType::i64, {E});
  expect(bias_E, "router_bias_update: bias_E", bias_E.dtype(), {E});
  if (!scalars->finite) return;
  const int64_t* const counts = counts_E.data<int64_t>();
  int64_t total = 0;
  for (int64_t e = 0; e < E; ++e) total += counts[e];
  dispatch_float(bias_E.dtype(), [&]<class F>() {
    for (int64_t e = 0; e < E; ++e) {
      // Integers compare exactly where a mean would be rounded.
      const int64_t above_mean = counts[e] * E - total;
      const int sign = above_mean < 0 ? 1 : above_mean > 0 ? -1 : 0;
      bias_E.data<F>()[e] += static_cast<F>(speed * sign);
    }
  });
}

}  // namespace dstrain
