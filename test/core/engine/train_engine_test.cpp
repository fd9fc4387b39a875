// The single-rank trainer: repeatability, accumulation, evaluation, skipped steps.
#include "core/engine/train_engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"
#include "test/support/model_check.h"

namespace dstrain::test {
namespace {

ModelConfig with_bias_updates(ModelConfig m, double speed = 0.01) {
  m.bias_update_speed = speed;
  return m;
}

struct Trained {
  std::vector<double> losses;
  std::string state;
};

// Steps on their own batches, two micro-batches each, with packed documents, masks and clipping.
Trained train(Backend& backend, const ModelConfig& model, Recompute recompute, int steps) {
  const TinyBatch all(model, {.seed = 8, .sequences = 4, .packed = true, .ignored = 0.2});
  EngineOptions options = tiny_options(all.split(2), DType::f32, recompute);
  options.optimizer.grad_clip = 0.5;
  TrainEngine engine(backend, model, options);
  engine.allocate();
  engine.initialize(3);
  Trained out;
  for (int step = 0; step < steps; ++step) {
    const BatchOptions next{
        .seed = static_cast<uint64_t>(20 + step), .sequences = 4, .packed = true, .ignored = 0.2};
    const StepResult result = run_step(engine, TinyBatch(model, next).split(2), 0.01);
    out.losses.insert(out.losses.end(),
                      {result.loss, result.mtp_loss, result.balance_loss, result.grad_norm});
  }
  out.state = state_bits(engine);
  return out;
}

}  // namespace

TEST_CASE("TrainEngine: nothing depends on what memory held before", "[engine]") {
  const ModelConfig model = GENERATE(tiny_moe(), tiny_v2(), tiny_dense(), tiny_mtp());
  const Recompute recompute = GENERATE(Recompute::none, Recompute::selective, Recompute::full);
  CAPTURE(model.n_routed_experts, static_cast<int>(recompute));
  CheckedBackend zeros(1, 0x00), nans(1, 0xff);
  const Trained a = train(zeros, model, recompute, 2), b = train(nans, model, recompute, 2);
  CHECK(a.losses == b.losses);
  CHECK(a.state == b.state);
}

TEST_CASE("TrainEngine: the same bits in every recompute mode, with any threads, run to run",
          "[engine]") {
  const ModelConfig model = GENERATE(with_bias_updates(tiny_moe()), with_bias_updates(tiny_v2()),
                                     tiny_dense(), with_bias_updates(tiny_mtp()));
  CAPTURE(model.n_routed_experts, model.num_nextn_predict_layers);
  const auto one = make_cpu_backend(1);
  const Trained reference = train(*one, model, Recompute::none, 4);
  for (const double loss : reference.losses) CHECK(std::isfinite(loss));
  for (const int threads : {1, 2, 3}) {
    const auto backend = make_cpu_backend(threads);
    for (const Recompute recompute : {Recompute::none, Recompute::selective, Recompute::full}) {
      CAPTURE(threads, static_cast<int>(recompute));
      const Trained other = train(*backend, model, recompute, 4);
      CHECK(other.losses == reference.losses);
      CHECK(other.state == reference.state);
    }
  }
}

TEST_CASE("TrainEngine: every recompute mode has the same bits of gradients", "[engine]") {
  const ModelConfig model = GENERATE(tiny_moe(), tiny_v2(), tiny_dense(), tiny_mtp());
  const auto backend = make_cpu_backend(2);
  const TinyBatch batch(model, {.seed = 5, .sequences = 3, .packed = true, .ignored = 0.2});
  std::vector<std::string> gradients;
  std::vector<int64_t> activation_bytes;
  for (const Recompute recompute : {Recompute::none, Recompute::selective, Recompute::full}) {
    TrainEngine engine(*backend, model, tiny_options(batch.split(1), DType::f32, recompute));
    engine.allocate();
    engine.initialize(3);
    randomize_constants(engine.parameters(), 4);
    run_gradients(engine, batch.split(1));
    gradients.push_back(gradient_bits(engine.parameters()));
    for (const MemoryOwner& owner : engine.memory())
      if (owner.name == "activations") activation_bytes.push_back(owner.bytes);
  }
  CHECK(gradients[0] == gradients[1]);
  CHECK(gradients[0] == gradients[2]);
  // What recomputation is for.
  CHECK(activation_bytes[0] > activation_bytes[1]);
  CHECK(activation_bytes[1] > activation_bytes[2]);
}

TEST_CASE("TrainEngine: three micro-batches of one are one of three", "[engine]") {
  const ModelConfig model = GENERATE(tiny_moe(), tiny_v2(), tiny_dense(), tiny_mtp());
  CAPTURE(model.n_routed_experts, model.num_nextn_predict_layers);
  const auto backend = make_cpu_backend(2);
  const TinyBatch batch(model,
                        {.seed = 6, .sequences = 3, .seq_len = 20, .packed = true, .ignored = 0.2});
  std::vector<std::vector<double>> gradients[2];
  StepResult first[2];
  double loss_20[2] = {};
  for (int split = 0; split < 2; ++split) {
    const std::vector<TinyBatch> parts = batch.split(split ? 1 : 3);
    EngineOptions options = tiny_options(parts);
    options.optimizer.grad_clip = 0.5;
    TrainEngine engine(*backend, model, options);
    engine.allocate();
    engine.initialize(3);
    run_gradients(engine, parts, 1e-3);
    for (const Parameter& p : engine.parameters().all())
      if (p.spec.trainable) gradients[split].push_back(elements(p.grad));
    first[split] = finish_step(engine);
    for (int step = 2; step <= 20; ++step) loss_20[split] = run_step(engine, parts, 1e-3).loss;
  }
  CHECK(first[1].loss == Catch::Approx(first[0].loss).epsilon(1e-6));
  CHECK(first[1].mtp_loss == Catch::Approx(first[0].mtp_loss).epsilon(1e-6));
  CHECK(first[1].balance_loss == Catch::Approx(first[0].balance_loss).epsilon(1e-6));
  CHECK(first[1].expert_counts_LE == first[0].expert_counts_LE);
  CHECK(first[1].grad_norm == Catch::Approx(first[0].grad_norm).epsilon(1e-5));
  const double floor = 1e-6 * first[0].grad_norm;
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    double error = 0, size = 0;
    for (size_t j = 0; j < gradients[0][i].size(); ++j) {
      error += std::pow(gradients[1][i][j] - gradients[0][i][j], 2);
      size += std::pow(gradients[0][i][j], 2);
    }
    CAPTURE(i);
    CHECK(std::sqrt(error) <= 1e-5 * std::max(std::sqrt(size), floor));
  }
  CHECK(loss_20[0] < first[0].loss);
  CHECK(loss_20[1] == Catch::Approx(loss_20[0]).epsilon(2e-6));
}

TEST_CASE("TrainEngine: evaluation changes nothing and agrees with training", "[engine]") {
  const ModelConfig model =
      GENERATE(with_bias_updates(tiny_moe()), with_bias_updates(tiny_mtp()), tiny_dense());
  const auto backend = make_cpu_backend(2);
  const TinyBatch batch(model, {.seed = 6, .sequences = 2, .packed = true, .ignored = 0.2});
  TrainEngine engine(*backend, model, tiny_options({batch}));
  engine.allocate();
  engine.initialize(3);
  run_step(engine, {batch}, 0.01);

  const std::string before = state_bits(engine);
  std::vector<double> token_loss(batch.tokens.size(), -1);
  const double sum = engine.evaluate(batch.host(), token_loss.data());
  CHECK(state_bits(engine) == before);
  CHECK(engine.updates() == 1);
  CHECK(engine.evaluate(batch.host()) == sum);
  double tokens_sum = 0;
  for (size_t t = 0; t < token_loss.size(); ++t) {
    if (batch.targets[t] < 0) {
      CHECK(token_loss[t] == 0);
    } else {
      CHECK(token_loss[t] > 0);
    }
    tokens_sum += token_loss[t];
  }
  CHECK(tokens_sum == Catch::Approx(sum).epsilon(1e-6));

  // Its sums and counts do not reach the next step.
  const StepResult next = run_step(engine, {batch}, 0.01);
  CHECK(next.loss * static_cast<double>(batch.valid_tokens()) == Catch::Approx(sum).epsilon(1e-6));
  int64_t counted = 0;
  for (const int64_t c : next.expert_counts_LE) counted += c;
  CHECK(counted ==
        std::ssize(batch.tokens) * model.num_experts_per_tok * engine.model().num_moe_layers());

  // Between micro-batches, too, it leaves the gradients alone.
  engine.begin_step(0.01, batch.valid_tokens());
  engine.accumulate(batch.host());
  const std::string gradients = gradient_bits(engine.parameters());
  std::vector<float> logits;
  engine.logits(batch.host(), 0, 3, logits);
  engine.evaluate(batch.host());
  CHECK(gradient_bits(engine.parameters()) == gradients);
}

TEST_CASE("TrainEngine: an evaluation inside a step leaves the step's sums alone", "[engine]") {
  const ModelConfig model = tiny_moe();
  const auto backend = make_cpu_backend(1);
  const TinyBatch batch(model, {.seed = 6}), other(model, {.seed = 7});
  TrainEngine engine(*backend, model, tiny_options({batch}));
  engine.allocate();
  engine.initialize(3);
  const StepResult alone = run_step(engine, {batch}, 0);
  engine.begin_step(0, batch.valid_tokens());
  engine.accumulate(batch.host());
  engine.evaluate(other.host());
  const StepResult interrupted = finish_step(engine);
  CHECK(interrupted.loss == alone.loss);
  CHECK(interrupted.balance_loss == alone.balance_loss);
  CHECK(interrupted.expert_counts_LE == alone.expert_counts_LE);
}

TEST_CASE("TrainEngine: a step that is not finite is skipped and not counted", "[engine]") {
  const ModelConfig model = with_bias_updates(tiny_moe());
  const auto backend = make_cpu_backend(2);
  const TinyBatch batch(model, {.seed = 6});
  TrainEngine engine(*backend, model, tiny_options({batch}));
  engine.allocate();
  engine.initialize(3);
  CHECK(run_step(engine, {batch}, 0.01).finite);
  const std::string before = state_bits(engine);

  run_gradients(engine, {batch}, 0.01);
  const Parameter* norm = engine.parameters().find("model.norm.weight");
  set_element(norm->grad, 0, std::numeric_limits<double>::quiet_NaN());
  const StepResult skipped = finish_step(engine);
  CHECK_FALSE(skipped.finite);
  CHECK(std::isfinite(skipped.loss));
  CHECK(engine.updates() == 1);
  CHECK(state_bits(engine) == before);  // the router's bias included

  CHECK(run_step(engine, {batch}, 0.01).finite);
  CHECK(engine.updates() == 2);
  CHECK(state_bits(engine) != before);

  // A weight that is not a number makes the loss one, too.
  set_element(norm->value, 0, std::numeric_limits<double>::quiet_NaN());
  const StepResult broken = run_step(engine, {batch}, 0.01);
  CHECK_FALSE(broken.finite);
  CHECK_FALSE(std::isfinite(broken.loss));
  CHECK(engine.updates() == 2);
}

TEST_CASE("TrainEngine: sequences without targets add nothing to the loss or its gradient",
          "[engine]") {
  ModelConfig model = GENERATE(tiny_moe(), tiny_dense(), tiny_mtp());
  model.aux_loss_alpha = 0;
  const auto backend = make_cpu_backend(1);
  const TinyBatch padded(model, {.seed = 6, .sequences = 3, .padding = 1});
  TrainEngine with(*backend, model, tiny_options({padded}));
  const TinyBatch bare = padded.part(0, 2);
  TrainEngine without(*backend, model, tiny_options({bare}));
  for (TrainEngine* engine : {&with, &without}) {
    engine->allocate();
    engine->initialize(3);
  }
  run_gradients(with, {padded});
  run_gradients(without, {bare});
  size_t index = 0;
  for (const Parameter& p : with.parameters().all()) {
    const Parameter& q = without.parameters().all()[index++];
    CAPTURE(p.spec.name);
    if (p.spec.trainable) CHECK(relative_l2(elements(p.grad), elements(q.grad)) <= 1e-5);
  }
  const StepResult a = finish_step(with), b = finish_step(without);
  CHECK(a.loss == Catch::Approx(b.loss).epsilon(1e-6));
  CHECK(a.mtp_loss == Catch::Approx(b.mtp_loss).epsilon(1e-6));
}

TEST_CASE("TrainEngine: a batch without any target has no loss and changes only by decay",
          "[engine]") {
  ModelConfig model = tiny_mtp();
  model.aux_loss_alpha = 0;
  const auto backend = make_cpu_backend(1);
  const TinyBatch batch(model, {.seed = 6, .sequences = 2, .padding = 2});
  REQUIRE(batch.valid_tokens() == 0);
  TrainEngine engine(*backend, model, tiny_options({batch}));
  engine.allocate();
  engine.initialize(3);
  const StepResult step = run_step(engine, {batch}, 0.01);
  CHECK(step.loss == 0);
  CHECK(step.mtp_loss == 0);
  CHECK(step.grad_norm == 0);
  CHECK(step.finite);
  for (const Parameter& p : engine.parameters().all()) {
    if (!p.spec.trainable) continue;
    for (const double g : elements(p.grad)) REQUIRE(g == 0);
    for (const double v : elements(p.value)) REQUIRE(std::isfinite(v));
  }
}

TEST_CASE("TrainEngine: engines side by side do not disturb each other", "[engine]") {
  const auto backend = make_cpu_backend(2);
  const ModelConfig models[2] = {with_bias_updates(tiny_moe()), tiny_dense()};
  std::string alone[2];
  for (int i = 0; i < 2; ++i) alone[i] = train(*backend, models[i], Recompute::selective, 3).state;

  std::vector<std::unique_ptr<TrainEngine>> engines;
  for (const ModelConfig& model : models) {
    const TinyBatch all(model, {.sequences = 4});
    EngineOptions options = tiny_options(all.split(2), DType::f32, Recompute::selective);
    options.optimizer.grad_clip = 0.5;
    engines.push_back(std::make_unique<TrainEngine>(*backend, model, options));
  }
  for (auto& engine : engines) engine->allocate();
  for (auto& engine : engines) engine->initialize(3);
  for (int step = 0; step < 3; ++step) {
    std::vector<std::vector<TinyBatch>> batches;
    for (int i = 0; i < 2; ++i) {
      const BatchOptions next{
          .seed = static_cast<uint64_t>(20 + step), .sequences = 4, .packed = true, .ignored = 0.2};
      const TinyBatch batch(models[i], next);
      batches.push_back(batch.split(2));
      engines[static_cast<size_t>(i)]->begin_step(0.01, batch.valid_tokens());
    }
    for (size_t micro = 0; micro < 2; ++micro)
      for (size_t i = 0; i < 2; ++i) engines[i]->accumulate(batches[i][micro].host());
    for (auto& engine : engines) finish_step(*engine);
  }
  for (size_t i = 0; i < 2; ++i) CHECK(state_bits(*engines[i]) == alone[i]);
}

TEST_CASE("TrainEngine: a micro-batch of another shape is refused", "[engine]") {
  const ModelConfig model = tiny_dense();
  const auto backend = make_cpu_backend(1);
  const TinyBatch batch(model, {.sequences = 2}), other(model, {.sequences = 3});
  TrainEngine engine(*backend, model, tiny_options({batch}));
  engine.allocate();
  engine.initialize(3);
  engine.begin_step(0, 1);
  CHECK_THROWS_WITH(engine.accumulate(other.host()),
                    Catch::Contains("does not fit the engine's shape"));
}

}  // namespace dstrain::test
