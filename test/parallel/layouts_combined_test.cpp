// Layouts of three axes and more, with everything at once that a step can have: several
// micro-batches of packed documents, a tied head, a prediction module, clipping, recomputation, and
// experts that overflow.
#include <algorithm>
#include <atomic>
#include <map>
#include <tuple>

#include "core/engine/parameter_io.h"
#include "test/support/catch.h"
#include "test/support/layout_jobs.h"
#include "test/support/wrapped_distribution.h"

namespace dstrain::test {
namespace {

constexpr int64_t kMicroBatches = 3;

// Two sequences in a micro-batch; of these as many as the schedule needs.
LayoutJob combined(const MeshShape& shape, int64_t zero, PipelineOrder schedule,
                   Recompute recompute, int64_t vocabulary = 67) {
  Config config = tiny_moe_job(layers_for(shape, schedule));
  config.model.vocab_size = vocabulary;
  config.model.tie_word_embeddings = true;
  config.model.num_nextn_predict_layers = 1;
  config.train.micro_batch = 2;
  const int64_t micro_batches =
      schedule == PipelineOrder::interleaved ? 2 * shape.pipeline : kMicroBatches;
  config.train.global_batch = micro_batches * config.train.micro_batch * shape.data;
  config.train.recompute = recompute;
  config.optimizer.grad_clip = 0.1;
  config.parallel.expert_buffer = 1.0;
  return job_at(config, shape, zero, schedule);
}

// Biases that send every token to experts 0 and 1, which lie on the same rank.
void crowd_first_experts(TrainEngine& engine) {
  for (const StateSlice& slice : engine.loaded_state())
    if (slice.parameter->spec.name.ends_with("e_score_correction_bias")) {
      std::vector<float> bias(static_cast<size_t>(slice.data.numel()));
      bias.at(0) = bias.at(1) = 1;
      write_tensor(engine.backend(), engine.stream(), bias, slice.data);
    }
}

class CountedRounds : public WrappedDispatcher {
 public:
  CountedRounds(TokenDispatcher& inner, std::atomic<int>& most)
      : WrappedDispatcher(inner), most_(most) {}
  int rounds(DistStream dist, const Routing& routing) const override {
    const int rounds = inner_.rounds(dist, routing);
    for (int seen = most_;
         !dist.dry && rounds > seen && !most_.compare_exchange_weak(seen, rounds);) {
    }
    return rounds;
  }

 private:
  std::atomic<int>& most_;
};

// References by what they depend on.
class References {
 public:
  const LayoutReference& of(const Config& config, int64_t steps) {
    const auto key = std::tuple(config.model.num_hidden_layers, config.train.global_batch,
                                config.model.vocab_size);
    auto at = all_.find(key);
    if (at == all_.end()) at = all_.try_emplace(key, config, steps, crowd_first_experts).first;
    return at->second;
  }

 private:
  std::map<std::tuple<int64_t, int64_t, int64_t>, LayoutReference> all_;
};

void check_combined(const LayoutJob& job, const LayoutReference& reference) {
  INFO(to_text(job) << ", recompute " << enum_name(job.config.train.recompute));
  REQUIRE(check_layout(job.config, job.shape).empty());
  for (const StepResult& step : reference.run.steps)
    CHECK(step.grad_norm > job.config.optimizer.grad_clip);
  CHECK(reference.run.steps.at(0).mtp_loss > 0);
  std::atomic<int> rounds = 0;
  LayoutRunOptions options = replay_options(reference);
  options.at_start = crowd_first_experts;
  options.fault.wrap = [&](Distribution& inner) {
    DistributionParts parts;
    parts.dispatcher = [&](TokenDispatcher& dispatcher) {
      return std::make_unique<CountedRounds>(dispatcher, rounds);
    };
    return std::make_unique<WrappedDistribution>(inner, parts);
  };
  const LayoutRun run = run_layout(job.config, job.shape, options);
  CHECK(failures(compare_layouts(job.config, reference.run, run)) == "");
  CHECK(rounds == std::min(4, job.shape.expert));  // one rank or, of 8, two receive the rows of all
  options.steps = 3;
  CHECK(bit_difference(run_layout(job.config, job.shape, options),
                       run_layout(job.config, job.shape, options)) == "");
}

void check_combined(const std::vector<LayoutJob>& jobs, int64_t steps) {
  References references;
  for (const LayoutJob& job : jobs) check_combined(job, references.of(job.config, steps));
}

TEST_CASE("layouts: a stage of three axes with all features, 20 steps, and twice the same bits",
          "[ranks]") {
  using enum PipelineOrder;
  using enum Recompute;
  check_combined(
      {combined({.data = 2, .context = 2, .tensor = 2, .expert = 8}, 2, one_f_one_b, selective),
       combined({.data = 2, .context = 2, .tensor = 2, .expert = 4}, 3, one_f_one_b, none),
       combined({.data = 2, .context = 2, .tensor = 2, .expert = 2}, 0, one_f_one_b, full),
       combined({.data = 2, .tensor = 4, .expert = 8}, 3, one_f_one_b, selective),
       combined({.context = 4, .tensor = 2, .expert = 4}, 2, one_f_one_b, full)},
      20);
}

TEST_CASE("layouts: a pipeline and two axes with all features, 20 steps, and twice the same bits",
          "[ranks]") {
  using enum PipelineOrder;
  using enum Recompute;
  check_combined(
      {combined({.pipeline = 2, .data = 2, .context = 2, .expert = 4}, 1, one_f_one_b, selective),
       combined({.pipeline = 2, .data = 2, .tensor = 2, .expert = 4}, 2, interleaved, full),
       combined({.pipeline = 2, .context = 2, .tensor = 2, .expert = 2}, 3, one_f_one_b, full),
       combined({.pipeline = 2, .data = 2, .tensor = 2, .expert = 2}, 1, zero_bubble, none)},
      20);
}

TEST_CASE("layouts: longer pipelines with all features, 20 steps, and twice the same bits",
          "[ranks]") {
  using enum PipelineOrder;
  using enum Recompute;
  check_combined({combined({.pipeline = 2, .tensor = 4, .expert = 4}, 1, interleaved, selective),
                  combined({.pipeline = 4, .data = 2, .expert = 2}, 0, zero_bubble, none),
                  combined({.pipeline = 4, .context = 2, .expert = 2}, 3, interleaved, none)},
                 20);
}

TEST_CASE("layouts: a vocabulary that leaves a tensor-parallel rank without words", "[ranks]") {
  using enum PipelineOrder;
  using enum Recompute;
  for (const int64_t words : {5, 67})
    check_combined(
        {combined({.tensor = 4, .expert = 2}, 3, one_f_one_b, none, words),
         combined({.pipeline = 2, .tensor = 4, .expert = 4}, 1, one_f_one_b, full, words),
         combined({.data = 2, .tensor = 2, .expert = 2}, 2, one_f_one_b, none, words),
         combined({.context = 2, .tensor = 4, .expert = 8}, 0, one_f_one_b, selective, words)},
        5);
}

TEST_CASE("layouts: without a replayed routing, losses agree at step 20", "[ranks]") {
  for (const MeshShape& shape :
       {MeshShape{.data = 2, .context = 2, .tensor = 2, .expert = 4},
        MeshShape{.pipeline = 2, .data = 2, .tensor = 2, .expert = 4},
        MeshShape{.context = 4, .expert = 4}, MeshShape{.tensor = 8, .expert = 8}}) {
    const LayoutJob job = job_at(tiny_moe_job(4), shape, 1);
    INFO(to_text(job));
    const LayoutReference reference(job.config, 20);
    LayoutRunOptions options = replay_options(reference);
    options.record = nullptr;
    const LayoutRun run = run_layout(job.config, job.shape, options);
    const double expected = reference.run.steps.back().loss, got = run.steps.back().loss;
    CHECK(std::abs(got - expected) <= 5e-5 * expected);
  }
}

}  // namespace
}  // namespace dstrain::test
