// Hugging Face weights: the mapping covers every parameter once, shards and types read right, folders that do
// not fit the model are refused by tensor name.
#include "core/checkpoint/hf_format.h"

#include <map>
#include <numeric>

#include "core/base/rng.h"
#include "core/model/model.h"
#include "test/core/checkpoint/checkpoint_fixture.h"

using namespace dstrain;
using checkpoint_test::ScratchFolder;
using checkpoint_test::write_bytes;

namespace {

ModelConfig tiny_mla() {
  ModelConfig m;
  m.vocab_size = 12;
  m.hidden_size = 8;
  m.num_hidden_layers = 2;
  m.intermediate_size = 6;
  m.moe_intermediate_size = 5;
  m.n_routed_experts = 4;
  m.n_shared_experts = 1;
  m.num_experts_per_tok = 2;
  m.num_attention_heads = 2;
  m.kv_lora_rank = 3;
  m.q_lora_rank = 7;
  m.qk_nope_head_dim = 4;
  m.qk_rope_head_dim = 2;
  m.v_head_dim = 3;
  return m;
}

ModelConfig tiny_gqa() {
  ModelConfig m;
  m.vocab_size = 12;
  m.hidden_size = 8;
  m.num_hidden_layers = 2;
  m.intermediate_size = 6;
  m.num_attention_heads = 6;
  m.num_key_value_heads = 2;
  m.head_dim = 4;
  m.attention_bias = true;
  m.tie_word_embeddings = true;
  return m;
}

using Weights = std::map<std::string, std::vector<float>>;

// Random values that bf16 holds exactly.
Weights random_weights(const ParameterSet& parameters) {
  Weights out;
  for (const Parameter& p : parameters.all()) {
    std::vector<float>& values = out[p.spec.name];
    const uint64_t stream = stream_id(p.spec.name.data(), p.spec.name.size());
    for (int64_t i = 0; i < p.global_numel(); ++i)
      values.push_back(static_cast<float>(random_u64(11, stream, static_cast<uint64_t>(i)) % 255) / 64 - 2);
  }
  return out;
}

void write(const std::string& folder, const ModelConfig& model, const ParameterSet& parameters,
           SafetensorsType type, const Weights& weights) {
  write_hf_weights(folder, model, parameters, type,
                   [&](const std::string& name) { return weights.at(name); });
}

Weights read(const std::string& folder, const ModelConfig& model, const ParameterSet& parameters,
             SafetensorsType* type = nullptr) {
  Weights out;
  const SafetensorsType found = read_hf_weights(
      folder, model, parameters,
      [&](const std::string& name, const std::vector<float>& values) { out[name] = values; });
  if (type) *type = found;
  return out;
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const DataError& e) {
    return e.what();
  }
  return "(no DataError)";
}

}  // namespace

TEST_CASE("hf_format: every element of every parameter has one place", "[checkpoint]") {
  for (const ModelConfig& config : {tiny_mla(), tiny_gqa()}) {
    const DeepSeekModel model(config);
    Weights covered;
    for (const Parameter& p : model.parameters().all())
      covered[p.spec.name].assign(static_cast<size_t>(p.global_numel()), 0.0f);
    for (const HfTensor& map : hf_tensors(config, model.parameters())) {
      const int64_t count = std::accumulate(map.shape.begin(), map.shape.end(), int64_t{1}, std::multiplies<>());
      const std::vector<float> ones(static_cast<size_t>(count), 1.0f);
      std::vector<float> hit(covered.at(map.parameter).size(), 0.0f);
      copy_from_hf(map, ones.data(), hit.data());
      CHECK(std::accumulate(hit.begin(), hit.end(), 0.0) == static_cast<double>(count));
      for (size_t i = 0; i < hit.size(); ++i) covered.at(map.parameter)[i] += hit[i];
    }
    for (const auto& [name, counts] : covered) {
      CAPTURE(name);
      CHECK(std::all_of(counts.begin(), counts.end(), [](float n) { return n == 1.0f; }));
    }
  }
}

TEST_CASE("hf_format: queries, keys and values lie by key/value head", "[checkpoint]") {
  const ModelConfig config = tiny_gqa();
  const DeepSeekModel model(config);
  // Parameter [G=2, m+2=5, Q=4, D=8]; the second key/value head's key is part 3 of group 1.
  for (const HfTensor& map : hf_tensors(config, model.parameters())) {
    if (map.name != "model.layers.0.self_attn.k_proj.weight") continue;
    REQUIRE(map.shape == std::vector<int64_t>{8, 8});
    REQUIRE(map.pieces.size() == 2);
    CHECK(map.pieces[1].hf_row == 4);
    CHECK(map.pieces[1].parameter_row == (1 * 5 + 3) * 4);
    CHECK(map.pieces[1].rows == 4);
    return;
  }
  FAIL("k_proj is missing");
}

TEST_CASE("hf_format: weights come back as they were written", "[checkpoint]") {
  for (const ModelConfig& config : {tiny_mla(), tiny_gqa()}) {
    for (const SafetensorsType type : {SafetensorsType::f32, SafetensorsType::bf16}) {
      const ScratchFolder folder;
      const DeepSeekModel model(config);
      const Weights weights = random_weights(model.parameters());
      write(folder.path(), config, model.parameters(), type, weights);
      SafetensorsType found = SafetensorsType::f64;
      CHECK(read(folder.path(), config, model.parameters(), &found) == weights);
      CHECK(found == type);
      const HfWeights files(folder.path());
      if (config.n_routed_experts > 0)
        CHECK(files.at("model.layers.1.mlp.gate.e_score_correction_bias").entry->type ==
              SafetensorsType::f32);
      CHECK(files.contains("lm_head.weight") == !config.tie_word_embeddings);
    }
  }
}

TEST_CASE("hf_format: shards are found through the index", "[checkpoint]") {
  const ModelConfig config = tiny_mla();
  const DeepSeekModel model(config);
  const Weights weights = random_weights(model.parameters());
  const ScratchFolder whole, sharded;
  write(whole.path(), config, model.parameters(), SafetensorsType::f32, weights);
  const SafetensorsReader source(whole / "model.safetensors");
  std::string index;
  for (int shard = 0; shard < 2; ++shard) {
    const std::string name = "model-0000" + std::to_string(shard + 1) + "-of-00002.safetensors";
    std::vector<SafetensorsSpec> specs;
    for (size_t i = static_cast<size_t>(shard); i < source.tensors().size(); i += 2) {
      specs.push_back({source.tensors()[i].name, source.tensors()[i].type, source.tensors()[i].shape});
      index += (index.empty() ? "" : ", ") + ("\"" + specs.back().name + "\": \"" + name + "\"");
    }
    SafetensorsWriter writer(File::create_new(sharded / name), specs, {});
    for (const SafetensorsSpec& spec : specs) {
      std::vector<char> bytes(static_cast<size_t>(source.at(spec.name).bytes));
      source.read(source.at(spec.name), bytes.data());
      writer.append(bytes.data(), std::ssize(bytes));
    }
    writer.finish();
  }
  const std::string path = sharded / "model.safetensors.index.json";
  write_bytes(path, "{\"metadata\": {\"total_size\": 1.5e3, \"x\": [null, {\"y\": true}]}, \"weight_map\": {" + index + "}}");
  CHECK(read(sharded.path(), config, model.parameters()) == weights);

  write_bytes(path, "{\"weight_map\": {\"a\": \"../elsewhere.safetensors\"}}");
  CHECK_THAT(message_of([&] { read(sharded.path(), config, model.parameters()); }),
             Catch::Contains("not a plain file name"));
}

TEST_CASE("hf_format: weights of another model are refused by name", "[checkpoint]") {
  const ScratchFolder folder;
  const ModelConfig config = tiny_mla();
  const DeepSeekModel model(config);
  write(folder.path(), config, model.parameters(), SafetensorsType::f32, random_weights(model.parameters()));

  ModelConfig more = config;
  more.n_routed_experts = 5;
  more.n_group = 1;
  const DeepSeekModel larger(more);
  CHECK_THAT(message_of([&] { read(folder.path(), more, larger.parameters()); }),
             Catch::Contains("mlp.gate.weight") && Catch::Contains("another shape"));

  ModelConfig fewer = config;
  fewer.n_shared_experts = 0;
  const DeepSeekModel smaller(fewer);
  CHECK_THAT(message_of([&] { read(folder.path(), fewer, smaller.parameters()); }),
             Catch::Contains("shared_experts") && Catch::Contains("has no place"));

  ModelConfig deeper = config;
  deeper.num_hidden_layers = 3;
  const DeepSeekModel third(deeper);
  CHECK_THAT(message_of([&] { read(folder.path(), deeper, third.parameters()); }),
             Catch::Contains("lack tensor") && Catch::Contains("model.layers.2."));
}
