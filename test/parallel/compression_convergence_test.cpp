// What compressed gradients cost in loss at equal steps: a small model learns which token follows
// which, on eight ranks. The same at the size of a real run: scripts/compression_curves.sh.
#include <algorithm>
#include <numeric>
#include <utility>

#include "parallel/residual_state.h"
#include "test/support/catch.h"
#include "test/support/layout_jobs.h"
#include "test/support/wrapped_distribution.h"

namespace dstrain::test {
namespace {

// An owner's own share arrives whole, so that few ranks would hide what becomes of the residuals.
constexpr int64_t kRanks = 8;
constexpr int64_t kSteps = 200, kLastSteps = 20;

// Four tokens in five follow from the one before them; the fifth is as random as it was.
void let_tokens_follow(SequenceBatch& batch, int32_t vocab) {
  for (size_t d = 0; d + 1 < batch.segment_offsets.size(); ++d) {
    const auto begin = static_cast<size_t>(batch.segment_offsets[d]);
    const auto end = static_cast<size_t>(batch.segment_offsets[d + 1]);
    for (size_t t = begin + 1; t < end; ++t) {
      int32_t& token = batch.tokens_T[t];
      if (token % 5 != 0) token = (batch.tokens_T[t - 1] * 5 + 7) % vocab;
      batch.targets_T[t - 1] = token;
    }
  }
}

// After each step every residual is multiplied by a factor.
class ScaledResiduals : public WrappedParamStore {
 public:
  ScaledResiduals(std::unique_ptr<ParamStore> inner, ParameterSet& parameters,
                  const RankPlace& place, float factor)
      : WrappedParamStore(std::move(inner), parameters, place), factor_(factor) {}
  void end_step(DistStream dist, const StepScalars* scalars) override {
    inner_->end_step(dist, scalars);
    if (dist.dry) return;
    for (const StateSlice& slice : inner_->saved())
      if (is_residual(slice.kind))
        std::for_each_n(slice.data.data<float>(), slice.end - slice.begin,
                        [this](float& element) { element *= factor_; });
  }

 private:
  float factor_;
};

DistributionWrap residuals_times(float factor) {
  return [factor](Distribution& inner) {
    DistributionParts parts;
    parts.store = [factor](std::unique_ptr<ParamStore> store, ParameterSet& parameters,
                           const RankPlace& place) {
      return std::make_unique<ScaledResiduals>(std::move(store), parameters, place, factor);
    };
    return std::make_unique<WrappedDistribution>(inner, parts);
  };
}

CompressionConfig method(CompressionMethod name, bool error_feedback = true) {
  CompressionConfig config;
  config.method = name;
  config.error_feedback = error_feedback;
  return config;
}

// Mean loss of the last steps. Batches are new to the model, so that it is that of held-out data.
double loss_with(const CompressionConfig& compression, DistributionWrap fault = {}) {
  Config config = tiny_dense_job(2);
  config.compression = compression;
  const LayoutJob job = job_at(std::move(config), {.data = kRanks}, 1);
  LayoutRunOptions options;
  options.steps = kSteps;
  options.fault.wrap = std::move(fault);
  options.fault.edit_batch = [&](const RankPlace&, int64_t, SequenceBatch& batch) {
    let_tokens_follow(batch, static_cast<int32_t>(job.config.model.vocab_size));
  };
  const LayoutRun run = run_layout(job.config, job.shape, options);
  CHECK(run.disagreement == "");
  const double sum =
      std::accumulate(run.steps.end() - kLastSteps, run.steps.end(), 0.0,
                      [](double so_far, const StepResult& step) { return so_far + step.loss; });
  return sum / static_cast<double>(kLastSteps);
}

TEST_CASE("compression: error feedback closes most of what top-k costs in loss", "[ranks]") {
  const double dense = loss_with({});
  CHECK(dense < 1.3);  // from 4.3: it learns
  const auto gap = [dense](double loss) { return loss / dense - 1; };
  const double without = gap(loss_with(method(CompressionMethod::topk, /*error_feedback=*/false)));
  CHECK(without > 0.08);
  const auto is_close = [without](double topk) { return topk < 0.04 && topk < without / 2.5; };

  const CompressionConfig topk = method(CompressionMethod::topk);
  const double with = gap(loss_with(topk));
  INFO("gaps of top-k to a loss of " << dense << ": " << with << " with error feedback, " << without
                                     << " without");
  CHECK(is_close(with));
  CHECK(gap(loss_with(topk, residuals_times(1))) == with);  // the wrapper itself changes nothing
  // Planted faults: residuals that are lost after each step, and some with the wrong sign.
  CHECK_FALSE(is_close(gap(loss_with(topk, residuals_times(0)))));
  CHECK_FALSE(is_close(gap(loss_with(topk, residuals_times(-1)))));
}

TEST_CASE("compression: int8 costs nearly nothing in loss", "[ranks]") {
  const double dense = loss_with({});
  CHECK(loss_with(method(CompressionMethod::int8)) / dense - 1 < 0.003);
}

}  // namespace
}  // namespace dstrain::test
