// How models and engines use a ParamStore, by a store that is strict, over all tiny models; and
// that every ZeRO stage trains as LocalParamStore does, bit for bit, where there is one rank.
#include <cmath>

#include "core/backend/cpu_backend.h"
#include "core/dist/local.h"
#include "parallel/param_shards.h"
#include "test/support/catch.h"
#include "test/support/strict_param_store.h"
#include "test/support/tiny_model.h"

using namespace dstrain;
using namespace dstrain::test;

namespace {

constexpr int kLocalStore = -1;

// One rank whose stores are strict, around a LocalParamStore or a ZeRO stage.
class StrictDistribution : public LocalDistribution {
 public:
  StrictDistribution(Backend& backend, int zero)
      : backend_(backend), zero_(zero), alone_(backend) {}
  std::unique_ptr<ParamStore> make_param_store(ParameterSet& parameters,
                                               const ParamStoreOptions& options) override {
    auto store = std::make_unique<StrictParamStore>(make_inner(parameters, options), parameters);
    stores.push_back(store.get());
    return store;
  }
  std::vector<StrictParamStore*> stores;

 private:
  std::unique_ptr<ParamStore> make_inner(ParameterSet& parameters,
                                         const ParamStoreOptions& options) {
    if (zero_ == kLocalStore) return std::make_unique<LocalParamStore>(parameters, options);
    const Parameter* norm = parameters.find("model.norm.weight");
    ShardRanks ranks;
    ranks.groups.fill(&alone_);
    return std::make_unique<ParamShards>(
        backend_, parameters, options, ZeroOptions{zero_, false, norm ? norm->spec.block : -1},
        ranks,
        [this](ReduceGroup, const ParameterSet& set, std::vector<GradRange> ranges) {
          ReduceRanks all;
          all.all = &alone_;
          return make_grad_reducer({.compression = {}, .gathers = true, .dtype = DType::f32}, all,
                                   set, std::move(ranges));
        },
        exposed_);
  }

  Backend& backend_;
  const int zero_;
  LocalCommunicator alone_;
  ExposedTime exposed_{backend_, /*measures=*/false};
};

struct Run {
  std::vector<std::string> faults;
  int64_t contributions = 0, acquires = 0;
  std::vector<double> losses, norms;
  std::map<std::string, std::vector<float>> state;
};

// By kind and parameter, whatever slices it lies in.
std::map<std::string, std::vector<float>> state_of(TrainEngine& engine) {
  std::map<std::string, std::vector<float>> state;
  for (const StateSlice& slice : engine.saved_state()) {
    std::vector<float>& out = state[slice.kind + "." + slice.parameter->spec.name];
    out.resize(static_cast<size_t>(slice.parameter->numel()));
    for (int64_t i = slice.begin; i < slice.end; ++i)
      out[static_cast<size_t>(i)] = static_cast<float>(element(slice.data, i - slice.begin));
  }
  return state;
}

struct Variant {
  Recompute recompute = Recompute::none;
  bool split_backward = false;
  size_t micro_batches = 1;
};

// Two steps, with an evaluation in the middle of each.
Run train(const ModelConfig& model, StrictDistribution* distribution, Backend& backend,
          const Variant& variant) {
  const size_t M = variant.micro_batches;
  const std::vector<TinyBatch> batches =
      TinyBatch(model, {.seed = 3, .sequences = 4, .packed = true})
          .split(4 / static_cast<int64_t>(M));
  EngineOptions options = tiny_options(batches, DType::f32, variant.recompute);
  options.split_backward = variant.split_backward;
  options.optimizer.grad_clip = 0;  // the norm's last bits depend on the layout
  TrainEngine engine(backend, model, options, distribution);
  engine.allocate();
  engine.initialize(5);
  Run run;
  for (int step = 0; step < 2; ++step) {
    engine.begin_step(0.02, 48);
    for (size_t m = 0; m < M; ++m) {
      engine.load(0, batches[m].host(), m + 1 == M);
      engine.forward(0, 0);
      if (variant.split_backward) {
        engine.backward_input(0, 0);
        engine.backward_weight(0, 0);
      } else {
        engine.backward(0, 0);
      }
      if (distribution) distribution->stores.at(0)->end_micro_batch();
      if (m == 0) run.losses.push_back(engine.evaluate(batches[0].host()));
    }
    const StepResult result = finish_step(engine);
    run.losses.push_back(result.loss);
    run.norms.push_back(result.grad_norm);
  }
  run.state = state_of(engine);
  if (!distribution) return run;
  const StrictParamStore& store = *distribution->stores.at(0);
  run.faults = store.faults();
  run.contributions = store.contributions();
  run.acquires = store.acquires();
  return run;
}

// With sums of sums (gradients that add up by micro-batch) the last bits differ.
void check_same(const Run& run, const Run& wanted, bool bits) {
  for (size_t i = 0; i < wanted.losses.size(); ++i)
    CHECK(run.losses[i] == Approx(wanted.losses[i]).epsilon(bits ? 0 : 1e-5).margin(0));
  for (size_t i = 0; i < wanted.norms.size(); ++i)
    CHECK(run.norms[i] == Approx(wanted.norms[i]).epsilon(bits ? 1e-12 : 1e-4));
  if (!bits) return;
  REQUIRE(run.state.size() == wanted.state.size());
  for (const auto& [name, values] : wanted.state) {
    CAPTURE(name);
    CHECK((run.state.at(name) == values));
  }
}

}  // namespace

TEST_CASE(
    "param store: models acquire what they read and say when gradients are ready, and every ZeRO stage "
    "trains alike",
    "[ranks]") {
  const auto backend = make_cpu_backend(1);
  const std::pair<const char*, ModelConfig> models[] = {
      {"moe", tiny_moe()}, {"v2", tiny_v2()}, {"dense", tiny_dense()}, {"mtp", tiny_mtp()}};
  const Variant variants[] = {{.micro_batches = 2},
                              {.split_backward = true},
                              {.split_backward = true, .micro_batches = 2},
                              {.recompute = Recompute::full},
                              {.recompute = Recompute::selective}};
  for (const auto& [name, model] : models)
    for (const Variant& variant : variants) {
      CAPTURE(name, static_cast<int>(variant.recompute), variant.split_backward);
      const Run wanted = train(model, nullptr, *backend, variant);
      for (const double loss : wanted.losses) REQUIRE(std::isfinite(loss));
      for (const int zero : {kLocalStore, 0, 1, 2, 3}) {
        CAPTURE(zero);
        StrictDistribution distribution(*backend, zero);
        const Run run = train(model, &distribution, *backend, variant);
        CHECK(run.faults == std::vector<std::string>());
        CHECK(run.contributions > 0);
        CHECK(run.acquires > 0);
        check_same(run, wanted, zero < 2 || variant.micro_batches == 1);
      }
    }
}

TEST_CASE("param store: chunks of a model acquire what they read and say when gradients are ready",
          "[ranks]") {
  const auto backend = make_cpu_backend(1);
  for (const ModelConfig& model : {tiny_moe(), tiny_dense()}) {
    const std::vector<TinyBatch> batches = {TinyBatch(model, {.seed = 4})};
    StrictDistribution distribution(*backend, 3);
    EngineOptions options = tiny_options(batches);
    options.chunks = {{0, 1, 1}, {1, 2, 1}};
    // A table that both chunks hold is no matter of this rank alone.
    ModelConfig untied = model;
    untied.tie_word_embeddings = false;
    TrainEngine engine(*backend, untied, options, &distribution);
    engine.allocate();
    engine.initialize(5);
    engine.begin_step(0.02, batches[0].valid_tokens());
    engine.load(0, batches[0].host(), true);
    const auto pass = [&](const Tensor& from, const Tensor& to) {
      backend->copy(engine.stream(), to.raw(), from.raw(), from.bytes());
      return to;
    };
    const Tensor x = engine.forward(0, 0);
    engine.forward(1, 0, pass(x, engine.receive_buffer(1, 0, false)));
    const Tensor dx = engine.backward(1, 0);
    engine.backward(0, 0, pass(dx, engine.receive_buffer(0, 0, true)));
    for (StrictParamStore* store : distribution.stores) {
      store->end_micro_batch();
      CHECK(store->faults() == std::vector<std::string>());
    }
    CHECK(std::isfinite(finish_step(engine).loss));
  }
}

TEST_CASE("param store: the strict store finds what it is for", "[ranks]") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  const DistStream dist{backend->ops(), *stream};
  ParameterSet parameters;
  parameters.declare({.name = "a", .shape = {4}, .shard = {}, .init = Init::ones, .block = 0});
  parameters.declare({.name = "b", .shape = {4}, .shard = {}, .init = Init::ones, .block = 1});
  parameters.finish_layout();
  StrictParamStore store(std::make_unique<LocalParamStore>(parameters), parameters);
  std::vector<DeviceMemory> memory;
  store.make_memory(
      [&](const char* owner, MemoryKind kind, const std::function<void(Arena&)>& make) {
        memory.emplace_back(*backend, 4096, kind);
        Arena arena(owner, memory.back().data(), 4096);
        make(arena);
      });
  store.clear(dist);
  for (const StateSlice& slice : store.loaded()) dist.ops.fill(dist.stream, slice.data, 1.0);
  const Parameter &a = *parameters.find("a"), &b = *parameters.find("b");
  CHECK(std::isnan(element(a.value, 0)));
  {
    const AcquiredBlock values(store, dist, 0);
    CHECK(element(a.value, 0) == 1);
    CHECK(std::isnan(element(b.value, 0)));
  }
  CHECK(std::isnan(element(a.value, 0)));

  const auto faults_after = [&](const auto& backward) {
    const size_t before = store.faults().size();
    store.begin_step(0);
    store.begin_micro_batch(true);
    backward();
    store.end_micro_batch();
    return std::vector<std::string>(store.faults().begin() + static_cast<int64_t>(before),
                                    store.faults().end());
  };
  const auto run = [&](const Parameter& p) {
    store.grad(p);
    store.grads_ready(dist, p.spec.block);
  };
  CHECK(faults_after([&] { run(b), run(a); }).empty());
  CHECK(faults_after([&] { run(b); }) == std::vector<std::string>{"block 0 was never ready"});
  CHECK(faults_after([&] { run(b), run(a), store.grads_ready(dist, 0); }) ==
        std::vector<std::string>{"block 0 is ready twice"});
  CHECK(faults_after([&] { run(b), run(a), store.grad(b); }) ==
        std::vector<std::string>{"a contribution to 'b' comes after block 1 was ready"});
  CHECK(faults_after([&] { run(b), store.grads_ready(dist, 0); }) ==
        std::vector<std::string>{"block 0 is ready without a contribution to 'a'"});
  CHECK(faults_after([&] { run(b), run(a), store.acquire_finish(dist, 1); }) ==
        std::vector<std::string>{"block 1 is not released"});
}
