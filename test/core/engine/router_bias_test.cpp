// Auxiliary-loss-free balancing over whole steps: the bias follows the counts of the global batch.
#include <algorithm>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

std::vector<const Parameter*> router_biases(TrainEngine& engine) {
  std::vector<const Parameter*> out;
  for (const Parameter& p : engine.parameters().all())
    if (!p.spec.trainable) out.push_back(&p);
  return out;
}

ModelConfig biased(double speed) {
  ModelConfig m = tiny_mtp();  // two MoE layers in prediction modules besides the main one
  m.bias_update_speed = speed;
  m.aux_loss_alpha = 0;
  return m;
}

}  // namespace

TEST_CASE("router bias: one step moves it against the load of the whole batch", "[engine]") {
  const ModelConfig model = biased(0.125);
  const auto backend = make_cpu_backend(1);
  const TinyBatch batch(model, {.seed = 6, .sequences = 3});
  TrainEngine engine(*backend, model, tiny_options(batch.split(1)));
  engine.allocate();
  engine.initialize(3);
  const StepResult step = run_step(engine, batch.split(1), 0);

  const int64_t E = model.n_routed_experts, K = model.num_experts_per_tok;
  const std::vector<const Parameter*> biases = router_biases(engine);
  REQUIRE(biases.size() == 3);
  REQUIRE(std::ssize(step.expert_counts_LE) == 3 * E);
  for (int64_t layer = 0; layer < 3; ++layer) {
    int64_t sum = 0;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t count = step.expert_counts_LE[static_cast<size_t>(layer * E + e)];
      const int64_t over = count * E - std::ssize(batch.tokens) * K;  // sign of count - mean
      const double wanted = over > 0 ? -0.125 : over < 0 ? 0.125 : 0.0;
      CAPTURE(layer, e, count);
      CHECK(element(biases[static_cast<size_t>(layer)]->value, e) == wanted);
      sum += count;
    }
    CHECK(sum == std::ssize(batch.tokens) * K);
  }
}

TEST_CASE("router bias: steps without learning even the load out", "[engine]") {
  const ModelConfig model = biased(0.02);
  const auto backend = make_cpu_backend(1);
  const TinyBatch batch(model, {.seed = 6, .sequences = 4, .seq_len = 40});
  TrainEngine engine(*backend, model, tiny_options({batch}));
  engine.allocate();
  engine.initialize(3);
  auto busiest = [&] {  // over the mean, of the main model's layer
    const std::vector<int64_t> counts = run_step(engine, {batch}, 0).expert_counts_LE;
    const auto end = counts.begin() + model.n_routed_experts;
    const double mean = static_cast<double>(std::ssize(batch.tokens) * model.num_experts_per_tok) /
                        static_cast<double>(model.n_routed_experts);
    return static_cast<double>(*std::max_element(counts.begin(), end)) / mean;
  };
  const double before = busiest();
  double after = before;
  for (int step = 0; step < 60; ++step) after = busiest();
  CHECK(before > 1.3);
  CHECK(after < 1.15);
}

TEST_CASE("router bias: speed 0 keeps what a checkpoint brought", "[engine]") {
  const ModelConfig model = biased(0);
  const auto backend = make_cpu_backend(1);
  const TinyBatch batch(model, {.seed = 6});
  TrainEngine engine(*backend, model, tiny_options({batch}));
  engine.allocate();
  engine.initialize(3);
  randomize_constants(engine.parameters(), 4);
  const Parameter* bias = router_biases(engine).front();
  const std::string before = bits_of(bias->value);
  run_step(engine, {batch}, 0.01);
  CHECK(bits_of(bias->value) == before);
}

}  // namespace dstrain::test
