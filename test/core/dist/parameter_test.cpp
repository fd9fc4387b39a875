// The layout of parameters in flat buffers, and their initial values.
#include "core/dist/parameter.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <tuple>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "core/base/rng.h"
#include "core/dist/local.h"
#include "core/model/model.h"
#include "test/support/catch.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

ParameterSpec spec(const char* name, std::vector<int64_t> shape, int block = 0, bool decay = true) {
  ParameterSpec s;
  s.name = name;
  s.shape = std::move(shape);
  s.block = block;
  s.weight_decay = decay;
  return s;
}

}  // namespace

TEST_CASE("ParameterSet: models of every kind tile their flat range with groups", "[dist]") {
  const DeepSeekModel model(GENERATE(tiny_moe(), tiny_v2(), tiny_dense(), tiny_mtp()));
  const ParameterSet& set = model.parameters();

  int64_t end = 0;
  std::set<std::tuple<int, ReduceGroup, bool>> kinds;
  for (const ParameterGroup& group : set.groups()) {
    CHECK(kinds.insert({group.block, group.reduce, group.weight_decay}).second);
    CHECK(group.begin == end);
    CHECK(group.end > group.begin);
    end = group.end;
  }
  CHECK(end == set.trainable_elements());

  std::vector<const Parameter*> order;
  for (const Parameter& p : set.all())
    if (p.spec.trainable) order.push_back(&p);
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
  int64_t previous_end = 0;
  int previous_block = 0;
  for (const Parameter* p : order) {
    CAPTURE(p->spec.name);
    CHECK(p->offset >= previous_end);
    CHECK(p->offset % ParameterSet::kAlignment == 0);
    CHECK(p->spec.block >= previous_block);
    previous_end = p->offset + p->numel();
    previous_block = p->spec.block;
    const auto group = std::find_if(set.groups().begin(), set.groups().end(), [&](const auto& g) {
      return g.begin <= p->offset && p->offset + p->numel() <= g.end;
    });
    REQUIRE(group != set.groups().end());
    CHECK(group->weight_decay == p->spec.weight_decay);
    CHECK((group->reduce == ReduceGroup::expert) == p->is_expert());
    CHECK(group->block == p->spec.block);
    // Decay belongs to matrices: gains, and biases of any shape, have none.
    CHECK(p->spec.weight_decay == (p->spec.init == Init::normal));
  }
}

TEST_CASE("ParameterSet: matrices of whole tiles start at tiles", "[dist]") {
  ParameterSet set;
  set.declare(spec("small", {3, 5}));
  const Parameter& tiled = set.declare(spec("tiled", {2, 128, 256}));
  const Parameter& row = set.declare(spec("row", {128, 255}));
  set.finish_layout();
  CHECK(tiled.offset == ParameterSet::kTileAlignment);
  CHECK(row.offset == ParameterSet::kTileAlignment + 2 * 128 * 256);
}

TEST_CASE("ParameterSet: cuts divide dims, and mistakes are named", "[dist]") {
  ParameterSet set;
  ParameterSpec cut = spec("experts", {8, 6, 4});
  cut.shard = {.expert_dim = 0};
  const Parameter& p = set.declare(cut, {.tensor = {1, 3}, .expert = {2, 4}});
  CHECK(p.local_shape == std::vector<int64_t>{2, 6, 4});
  CHECK(p.local_begin == std::vector<int64_t>{4, 0, 0});
  CHECK(p.numel() == 48);
  CHECK(p.global_numel() == 192);
  CHECK_THROWS_WITH(set.declare(cut), Catch::Contains("experts") && Catch::Contains("twice"));
  cut.name = "other";
  CHECK_THROWS_WITH(set.declare(cut, {.tensor = {}, .expert = {0, 5}}),
                    Catch::Contains("does not divide over 5 ranks"));
  cut.shard = {.tensor_dim = 1, .expert_dim = 0};
  CHECK_THROWS_WITH(set.declare(cut), Catch::Contains("cut over two axes"));

  // A vocabulary of any size: the last parts are smaller, or empty.
  ParameterSpec table = spec("table", {5, 4});
  table.shard = {.tensor_dim = 0, .uneven = true};
  std::vector<std::pair<int64_t, int64_t>> parts;
  for (int rank = 0; rank < 4; ++rank) {
    ParameterSet one;
    const Parameter& part = one.declare(table, {.tensor = {rank, 4}, .expert = {}});
    parts.emplace_back(part.local_begin[0], part.local_shape[0]);
  }
  CHECK(parts == std::vector<std::pair<int64_t, int64_t>>{{0, 2}, {2, 2}, {4, 1}, {5, 0}});
  set.finish_layout();
  CHECK_THROWS_WITH(set.declare(spec("late", {4})), Catch::Contains("before the layout is fixed"));
}

TEST_CASE("ParameterSet: looking a name up does not take longer the more there are", "[dist]") {
  constexpr int kParameters = 100000;  // linear search would take a minute
  const auto started = std::chrono::steady_clock::now();
  ParameterSet set;
  std::vector<const Parameter*> declared;
  for (int i = 0; i < kParameters; ++i) {
    const std::string name = "model.layers." + std::to_string(i) + ".weight";
    declared.push_back(&set.declare(spec(name.c_str(), {1})));
  }
  const ParameterSet& there = set;
  for (int i = 0; i < kParameters; i += 7)
    REQUIRE(there.find("model.layers." + std::to_string(i) + ".weight") ==
            declared[static_cast<size_t>(i)]);
  CHECK(there.find("model.layers.0") == nullptr);
  CHECK(std::chrono::steady_clock::now() - started < std::chrono::seconds(8));
}

TEST_CASE("ParameterSet: initial values are keyed by seed, name and element", "[dist]") {
  const auto backend = make_cpu_backend(2);
  const ModelConfig model = tiny_moe();
  const TinyBatch batch(model, {});
  TrainEngine engine(*backend, model, tiny_options({batch}));
  engine.allocate();
  engine.initialize(42);
  for (const Parameter& p : engine.parameters().all()) {
    CAPTURE(p.spec.name);
    const uint64_t stream = stream_id(p.spec.name.data(), p.spec.name.size());
    for (int64_t i = 0; i < p.numel(); ++i) {
      const double normal = p.spec.std * random_normal(42, stream, static_cast<uint64_t>(i));
      const double constant = p.spec.init == Init::ones ? 1.0 : 0.0;
      const double wanted = p.spec.init == Init::normal ? normal : constant;
      REQUIRE(element(p.value, i) == static_cast<double>(static_cast<float>(wanted)));
    }
  }
  // Numbers of an independent implementation of Philox4x32-10 and FNV-1a: a change here makes old
  // seeds mean other models.
  const Tensor& embedding = engine.parameters().find("model.embed_tokens.weight")->value;
  const Tensor& experts = engine.parameters().find("model.layers.1.mlp.experts.down_proj")->value;
  CHECK(element(embedding, 0) == Catch::Approx(-0.02432736108268556).epsilon(1e-6));
  CHECK(element(embedding, 887) == Catch::Approx(0.12339524567945957).epsilon(1e-6));
  CHECK(element(experts, 1000) == Catch::Approx(-0.11912172690746922).epsilon(1e-6));

  TrainEngine again(*backend, model, tiny_options({batch}));
  again.allocate();
  again.initialize(42);
  CHECK(state_bits(again) == state_bits(engine));
  again.initialize(43);
  CHECK(state_bits(again) != state_bits(engine));
}

TEST_CASE("LocalParamStore: the first contribution overwrites, what got none becomes zero",
          "[dist]") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  ParameterSet set;
  const Parameter& a = set.declare(spec("a", {2, 2}));
  const Parameter& b = set.declare(spec("b", {3, 1}));
  ParameterSpec fixed = spec("fixed", {2});
  fixed.trainable = false;
  const Parameter& buffer = set.declare(fixed);
  set.finish_layout();
  std::vector<float> values(static_cast<size_t>(set.trainable_elements())),
      grads(values.size(), 7.0f);
  std::vector<float> buffers(static_cast<size_t>(set.buffer_elements()));
  const int64_t N = set.trainable_elements();
  set.bind(Tensor(values.data(), DType::f32, {N}), Tensor(grads.data(), DType::f32, {N}),
           Tensor(buffers.data(), DType::f32, {set.buffer_elements()}));

  LocalParamStore store(set);
  for (int step = 0; step < 2; ++step) {
    store.begin_step(0);
    CHECK(store.grad(a).accumulate == Accumulate::overwrite);
    CHECK(store.grad(a).accumulate == Accumulate::add);
    CHECK(store.grad(a).grad.raw() == a.grad.raw());
    store.reduce_gradients({backend->ops(), *stream});
    CHECK(element(a.grad, 3) == 7.0);
    CHECK(element(b.grad, 0) == 0.0);
    CHECK(element(b.grad, 2) == 0.0);
  }
  CHECK_THROWS_WITH(store.grad(buffer), Catch::Contains("fixed"));
}

}  // namespace dstrain::test
