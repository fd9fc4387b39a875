// The memory plan: what it promises is what a step takes, and what each recompute mode keeps.
#include <algorithm>
#include <string>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "core/engine/train_engine.h"
#include "test/support/catch.h"
#include "test/support/model_check.h"

namespace dstrain::test {
namespace {

// Bytes of f32 (i32) elements in an arena.
int64_t room(int64_t elements) {
  return (4 * elements + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
}

int64_t planned_activations(const ModelConfig& model, Recompute recompute, int64_t T,
                            bool training = true) {
  const auto backend = make_cpu_backend(1);
  EngineOptions options;
  options.seq_len = T;
  options.recompute = recompute;
  options.training = training;
  const TrainEngine engine(*backend, model, options);
  for (const MemoryOwner& owner : engine.memory())
    if (owner.name == "activations") return owner.bytes;
  FAIL("no activations in the plan");
  return 0;
}

ModelConfig with_layers(ModelConfig m, int64_t layers) {
  m.num_hidden_layers = layers;
  return m;
}

// Activations that one more block costs.
int64_t block_bytes(const ModelConfig& model, Recompute recompute, int64_t T) {
  return planned_activations(with_layers(model, 4), recompute, T) -
         planned_activations(with_layers(model, 3), recompute, T);
}

// Routing, scores and balance coefficients of one sequence: kept in every mode.
int64_t routing_bytes(const ModelConfig& m, int64_t T) {
  const int64_t E = m.n_routed_experts, K = m.num_experts_per_tok;
  return room(T * E) + 5 * room(T * K) + room(E + 1) + (m.aux_loss_alpha > 0 ? room(E) : 0);
}

}  // namespace

TEST_CASE("memory plan: it is what a step uses, to the byte", "[engine]") {
  const ModelConfig model = GENERATE(tiny_moe(), tiny_v2(), tiny_dense(), tiny_mtp());
  const Recompute recompute = GENERATE(Recompute::none, Recompute::selective, Recompute::full);
  const DType dtype = GENERATE(DType::f32, DType::f64);
  const bool training = GENERATE(true, false);
  CAPTURE(model.n_routed_experts, static_cast<int>(recompute), dtype_name(dtype), training);
  CheckedBackend backend(2, 0xab);
  const TinyBatch batch(model, {.sequences = 2, .packed = true});
  EngineOptions options = tiny_options({batch}, dtype, recompute);
  options.training = training;
  TrainEngine engine(backend, model, options);
  CHECK(backend.blocks().empty());  // planning takes no memory
  engine.allocate();

  std::vector<MemoryOwner> owners = engine.memory();
  CHECK(owners.back().name == "workspace");  // the back end's own
  CHECK(owners.back().bytes == backend.workspace_bytes());
  owners.pop_back();
  REQUIRE(backend.blocks().size() == owners.size());
  int64_t total = 0;
  for (size_t i = 0; i < owners.size(); ++i) {
    CAPTURE(owners[i].name);
    CHECK(backend.blocks()[i].bytes == std::max<int64_t>(owners[i].bytes, Arena::kAlignment));
    total += owners[i].bytes;
  }
  CHECK(engine.memory_bytes() == total + backend.workspace_bytes());

  engine.initialize(1);
  if (training) run_step(engine, {batch}, 0.01);
  std::vector<double> token_loss(batch.tokens.size());
  engine.evaluate(batch.host(), token_loss.data());
  std::vector<float> logits;
  engine.logits(batch.host(), 0, std::ssize(batch.tokens), logits);

  CHECK(backend.guards_intact());
  CHECK(backend.blocks().size() == owners.size());  // a step allocates nothing
  for (size_t i = 0; i < owners.size(); ++i) {
    CAPTURE(owners[i].name);
    if (owners[i].name != "activations" && owners[i].name != "scratch") continue;
    // The last tensor of the peak may end up to one alignment before the plan's end.
    CHECK(owners[i].bytes - backend.touched(backend.blocks()[i]) < Arena::kAlignment);
  }
}

TEST_CASE("memory plan: what a dense block keeps in each recompute mode", "[engine]") {
  const ModelConfig m = tiny_dense();
  const int64_t T = 50, D = m.hidden_size, H = 4, G = 2, Q = 6;
  const int64_t input = room(T * D);
  const int64_t saved = room(T * D) + 2 * room(T) +         // second sum, rstd
                        room(T * H * Q) + room(T * H) +     // attention output, log-sum-exp
                        room(T * 2 * m.intermediate_size);  // gate and up
  const int64_t cheap = 2 * room(T * D) + room(T * H * Q) + 2 * room(T * G * Q);  // norms, q, k, v
  CHECK(block_bytes(m, Recompute::full, T) == input);
  CHECK(block_bytes(m, Recompute::selective, T) == input + saved);
  CHECK(block_bytes(m, Recompute::none, T) == input + saved + cheap);
}

TEST_CASE("memory plan: what a block of experts keeps in each recompute mode", "[engine]") {
  const ModelConfig m = tiny_moe();
  const int64_t T = 50, D = m.hidden_size, H = 3, Q = 10, W = 7, L = 10, P = 4, M = 9;
  const int64_t R = T * m.num_experts_per_tok, I = m.moe_intermediate_size;
  const int64_t input = room(T * D) + routing_bytes(m, T);
  const int64_t saved = room(T * D) + 2 * room(T) + room(T * M) + room(T * (L + P)) +
                        room(T * H * W) + room(T * H) + room(T * 2 * I) + room(R * 2 * I);
  const int64_t cheap = 2 * room(T * D) + room(T * M) + room(T) + room(T * H * Q) + room(T * L) +
                        room(T) + room(T * H * Q) + room(T * H * W);
  CHECK(block_bytes(m, Recompute::full, T) == input);
  CHECK(block_bytes(m, Recompute::selective, T) == input + saved);
  CHECK(block_bytes(m, Recompute::none, T) == input + saved + cheap);
}

TEST_CASE("memory plan: what a prediction module keeps under full recomputation", "[engine]") {
  ModelConfig two = tiny_mtp(), one = tiny_mtp();
  one.num_nextn_predict_layers = 1;
  const int64_t T = 50, D = two.hidden_size;
  const int64_t joined = room(T * D) + 2 * room(T) + room(T * 2 * D);
  const int64_t block = room(T * D) + routing_bytes(two, T), head = 2 * room(T * D) + room(T);
  CHECK(planned_activations(two, Recompute::full, T) -
            planned_activations(one, Recompute::full, T) ==
        joined + block + head);
}

TEST_CASE("memory plan: evaluation needs no more than full recomputation, in every mode",
          "[engine]") {
  const ModelConfig m = GENERATE(tiny_moe(), tiny_dense());
  const int64_t least = planned_activations(m, Recompute::full, 50, false);
  CHECK(planned_activations(m, Recompute::selective, 50, false) == least);
  CHECK(planned_activations(m, Recompute::none, 50, false) == least);
  CHECK(least <= planned_activations(m, Recompute::full, 50, true));
}

TEST_CASE("memory plan: parameters, gradients and moments by type", "[engine]") {
  const auto backend = make_cpu_backend(1);
  const DType dtype = GENERATE(DType::f32, DType::f64);
  EngineOptions options;
  options.dtype = dtype;
  TrainEngine engine(*backend, tiny_dense(), options);
  const int64_t N = engine.parameters().trainable_elements() * dtype_bytes(dtype);
  auto bytes = [&](const std::string& name) {
    for (const MemoryOwner& owner : engine.memory())
      if (owner.name == name) return owner.bytes;
    return int64_t{-1};
  };
  CHECK(bytes("parameters") == N);
  CHECK(bytes("gradients") == N);
  CHECK(bytes("optimizer state") == 2 * N);
  options.training = false;
  const TrainEngine evaluation(*backend, tiny_dense(), options);
  for (const MemoryOwner& owner : evaluation.memory()) {
    CHECK(owner.name != "gradients");
    CHECK(owner.name != "optimizer state");
  }
}

}  // namespace dstrain::test
