// What a model promises beyond its gradients: several micro-batches in flight, chunks of a
// pipeline, documents that do not see each other, tokens that do not see the future.
#include "core/model/model.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"
#include "test/support/model_check.h"
#include "test/support/tiny_model_runner.h"

namespace dstrain::test {
namespace {

std::vector<float> all_logits(TrainEngine& engine, const TinyBatch& batch) {
  std::vector<float> logits;
  engine.logits(batch.host(), 0, std::ssize(batch.tokens), logits);
  return logits;
}

// Sum over chunks for parameters that several of them hold (the tied table).
std::vector<double> gradient_of(const std::string& name, std::vector<ModelRunner*> chunks) {
  std::vector<double> sum;
  for (ModelRunner* chunk : chunks) {
    const Parameter* p = chunk->parameters().find(name);
    if (!p) continue;
    const std::vector<double> part = elements(p->grad);
    sum.resize(part.size());
    for (size_t i = 0; i < part.size(); ++i) sum[i] += part[i];
  }
  return sum;
}

ModelConfig tied(ModelConfig m) {
  m.tie_word_embeddings = true;
  return m;
}

ModelConfig deeper(ModelConfig m) {
  m.num_hidden_layers = 4;
  return m;
}

}  // namespace

TEST_CASE("model: two micro-batches in flight are two after each other", "[model]") {
  const ModelConfig config = GENERATE(tiny_moe(), tiny_v2(), tied(tiny_mtp()), tiny_dense());
  const Recompute recompute = GENERATE(Recompute::none, Recompute::selective, Recompute::full);
  CAPTURE(config.n_routed_experts, static_cast<int>(recompute));
  const auto backend = make_cpu_backend(2);
  const TinyBatch both(config, {.seed = 9, .sequences = 4, .packed = true});
  ModelRunner sequential(*backend, config, DType::f32, recompute);
  ModelRunner interleaved(*backend, config, DType::f32, recompute);
  for (ModelRunner* runner : {&sequential, &interleaved}) {
    runner->initialize(3);
    Flight a(*backend, runner->model(), both.part(0, 2)),
        b(*backend, runner->model(), both.part(2, 4));
    runner->begin(both.valid_tokens());
    runner->forward(a);
    if (runner == &sequential) runner->backward(a);
    runner->forward(b);
    if (runner == &interleaved) runner->backward(a);
    runner->backward(b);
    runner->finish();
  }
  CHECK(interleaved.loss() == sequential.loss());
  CHECK(interleaved.mtp_loss() == sequential.mtp_loss());
  CHECK(interleaved.balance_loss() == sequential.balance_loss());
  CHECK(interleaved.counts() == sequential.counts());
  for (const Parameter& p : sequential.parameters().all()) {
    if (!p.spec.trainable) continue;
    CAPTURE(p.spec.name);
    const Parameter* q = interleaved.parameters().find(p.spec.name);
    // The head's gradient is made in forward, so a tied table adds its parts in another order.
    if (config.tie_word_embeddings && p.spec.name == "model.embed_tokens.weight")
      CHECK(relative_l2(elements(q->grad), elements(p.grad)) < 1e-6);
    else
      CHECK(bits_of(q->grad) == bits_of(p.grad));
  }
}

TEST_CASE("model: chunks of a pipeline are the whole model", "[model]") {
  const ModelConfig config =
      GENERATE(deeper(tiny_moe()), deeper(tied(tiny_mtp())), deeper(tiny_dense()));
  const Recompute recompute = GENERATE(Recompute::none, Recompute::full);
  const int64_t cut = GENERATE(1, 3);
  CAPTURE(config.n_routed_experts, static_cast<int>(recompute), cut);
  const auto backend = make_cpu_backend(1);
  const TinyBatch batch(config, {.seed = 9, .sequences = 2, .packed = true});
  ModelRunner whole(*backend, config, DType::f64, recompute);
  ModelRunner first(*backend, config, DType::f64, recompute, {.last_layer = cut});
  ModelRunner last(*backend, config, DType::f64, recompute, {.first_layer = cut});
  CHECK(first.model().has_embedding());
  CHECK_FALSE(first.model().has_head());
  CHECK_FALSE(last.model().has_embedding());
  CHECK(last.model().has_head());
  for (ModelRunner* runner : {&whole, &first, &last}) {
    runner->initialize(3);
    runner->begin(batch.valid_tokens());
  }
  Flight flight(*backend, whole.model(), batch);
  whole.forward(flight);
  whole.backward(flight);

  const int64_t T = std::ssize(batch.tokens), D = config.hidden_size;
  Flight a(*backend, first.model(), batch), b(*backend, last.model(), batch);
  first.forward(a);
  std::vector<double> sent = a.output(), gradient(sent.size());
  const Tensor dx_TD(gradient.data(), DType::f64, {T, D});
  last.forward(b, Tensor(sent.data(), DType::f64, {T, D}));
  last.backward(b, {}, dx_TD);
  first.backward(a, dx_TD);

  for (ModelRunner* runner : {&whole, &first, &last}) runner->finish();
  CHECK(last.loss() == Catch::Approx(whole.loss()).epsilon(1e-13));
  CHECK(last.mtp_loss() == Catch::Approx(whole.mtp_loss()).epsilon(1e-13));
  CHECK(first.balance_loss() + last.balance_loss() ==
        Catch::Approx(whole.balance_loss()).epsilon(1e-13));
  for (size_t i = 0; i < whole.counts().size(); ++i)
    CHECK(first.counts()[i] + last.counts()[i] == whole.counts()[i]);
  for (const Parameter& p : whole.parameters().all()) {
    if (!p.spec.trainable) continue;
    CAPTURE(p.spec.name);
    CHECK(relative_l2(gradient_of(p.spec.name, {&first, &last}), elements(p.grad)) < 1e-12);
  }
}

TEST_CASE("model: a packed document gives what it gives alone", "[model]") {
  const ModelConfig config = GENERATE(tiny_moe(), tiny_v2(), tiny_dense());
  const auto backend = make_cpu_backend(1);
  const TinyBatch packed(config, {.seed = 9, .sequences = 2, .seq_len = 24, .packed = true});
  REQUIRE(packed.num_segments() > 6);
  TrainEngine engine(*backend, config, tiny_options({packed}, DType::f64));
  engine.allocate();
  engine.initialize(3);
  randomize_constants(engine.parameters(), 4);
  std::vector<double> losses(packed.tokens.size());
  engine.evaluate(packed.host(), losses.data());

  const HostBatch view = packed.host();
  for (int64_t s = 0; s < view.num_segments; ++s) {
    const int32_t begin = view.segment_offsets[s], length = view.segment_offsets[s + 1] - begin;
    CAPTURE(begin, length);
    EngineOptions options = tiny_options({packed}, DType::f64);
    options.micro_batch = options.global_batch = 1;
    options.seq_len = length;
    TrainEngine alone(*backend, config, options);
    alone.allocate();
    alone.initialize(3);
    randomize_constants(alone.parameters(), 4);
    const int32_t offsets[2] = {0, length};
    std::vector<int32_t> positions(packed.positions.begin(), packed.positions.begin() + length);
    for (int32_t t = 0; t < length; ++t)
      REQUIRE(packed.positions[static_cast<size_t>(begin + t)] == t);
    for (int32_t t = 0; t < length; ++t) positions[static_cast<size_t>(t)] = t;
    std::vector<double> wanted(static_cast<size_t>(length));
    alone.evaluate(
        {1, length, view.tokens_T + begin, positions.data(), view.targets_T + begin, offsets, 1},
        wanted.data());
    for (int32_t t = 0; t < length; ++t)
      CHECK(losses[static_cast<size_t>(begin + t)] ==
            Catch::Approx(wanted[static_cast<size_t>(t)]).epsilon(1e-12));
  }
}

TEST_CASE("model: a token changes nothing before it, and something at and after it", "[model]") {
  const ModelConfig config = GENERATE(tiny_moe(), tiny_v2(), tiny_dense());
  const auto backend = make_cpu_backend(1);
  const TinyBatch batch(config, {.seed = 9, .sequences = 2, .seq_len = 16});
  TrainEngine engine(*backend, config, tiny_options({batch}, DType::f64));
  engine.allocate();
  engine.initialize(3);
  const std::vector<float> before = all_logits(engine, batch);
  const int64_t V = config.vocab_size, changed = 5;
  TinyBatch other = batch;
  other.tokens[changed] = (other.tokens[changed] + 1) % static_cast<int32_t>(V);
  const std::vector<float> after = all_logits(engine, other);
  for (int64_t t = 0; t < 32; ++t) {
    double difference = 0;
    for (int64_t v = 0; v < V; ++v)
      difference =
          std::max(difference, std::abs(static_cast<double>(after[static_cast<size_t>(t * V + v)]) -
                                        before[static_cast<size_t>(t * V + v)]));
    CAPTURE(t);
    if (t < changed || t >= 16)
      CHECK(difference < 1e-12);  // the other sequence, too
    else
      CHECK(difference > 1e-6);
  }
}

TEST_CASE("model: the head by chunks of rows is the head at once", "[model]") {
  ModelConfig config = tiny_dense();
  config.num_hidden_layers = 1;
  config.vocab_size = 16500;  // 64 rows a chunk in f64
  const auto backend = make_cpu_backend(2);
  const TinyBatch batch(config, {.seed = 9, .sequences = 3, .seq_len = 50, .ignored = 0.1});
  std::vector<std::vector<double>> gradients[2];
  double loss[2], token_loss[2] = {};
  for (const int chunked : {0, 1}) {
    const std::vector<TinyBatch> parts = batch.split(chunked ? 3 : 1);
    TrainEngine engine(*backend, config, tiny_options(parts, DType::f64));
    engine.allocate();
    engine.initialize(3);
    run_gradients(engine, parts);
    for (const Parameter& p : engine.parameters().all())
      gradients[chunked].push_back(elements(p.grad));
    loss[chunked] = finish_step(engine).loss;
    for (const TinyBatch& part : parts) {
      std::vector<double> losses(part.tokens.size());
      engine.evaluate(part.host(), losses.data());
      for (const double l : losses) token_loss[chunked] += l;
    }
  }
  CHECK(loss[1] == Catch::Approx(loss[0]).epsilon(1e-13));
  CHECK(token_loss[1] == Catch::Approx(token_loss[0]).epsilon(1e-13));
  CHECK(token_loss[0] ==
        Catch::Approx(loss[0] * static_cast<double>(batch.valid_tokens())).epsilon(1e-13));
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    CAPTURE(i);
    CHECK(relative_l2(gradients[1][i], gradients[0][i]) < 1e-12);
  }
}

}  // namespace dstrain::test
