// Hugging Face weights: the mapping covers every parameter once, shards and types read right, folders that do
// not fit the model are refused by tensor name.
#include "core/checkpoint/hf_format.h"

#include <map>
#include <numeric>

#include "core/base/log.h"
#include "core/base/rng.h"
#include "core/checkpoint/json_strict.h"
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
  write_hf_weights(folder, model, parameters, uniform_hf_types(type, model, parameters),
                   [&](const std::string& name) { return weights.at(name); });
}

Weights read(const std::string& folder, const ModelConfig& model, const ParameterSet& parameters,
             HfTypes* types = nullptr) {
  Weights out;
  const HfTypes found = read_hf_weights(
      folder, model, parameters,
      [&](const std::string& name, const std::vector<float>& values) { out[name] = values; });
  if (types) *types = found;
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
      HfTypes found;
      CHECK(read(folder.path(), config, model.parameters(), &found) == weights);
      CHECK(found == uniform_hf_types(type, config, model.parameters()));
      CHECK(found.usual == type);
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

// Every bit pattern of 16 bits occurs in the folder, and F32 bits of every kind.
TEST_CASE("hf_format: mixed types come back to the bit, shards or not", "[checkpoint]") {
  constexpr SafetensorsType kTypes[] = {SafetensorsType::f16, SafetensorsType::bf16,
                                        SafetensorsType::f32, SafetensorsType::f64};
  ModelConfig config = tiny_mla();
  config.vocab_size = 8192;  // 2^16 elements in the embedding
  const int turn = GENERATE(0, 1, 2, 3);
  const bool sharded = GENERATE(false, true);
  const DeepSeekModel model(config);
  const std::vector<HfTensor> maps = hf_tensors(config, model.parameters());
  std::vector<SafetensorsSpec> specs[2];
  std::map<std::string, std::string> bytes;
  std::string index;
  for (size_t i = 0; i < maps.size(); ++i) {
    const SafetensorsType type = kTypes[(i + static_cast<size_t>(turn)) % 4];
    const int shard = sharded ? static_cast<int>(i / 3 % 2) : 0;
    specs[shard].push_back({maps[i].name, type, maps[i].shape});
    const int64_t count = *checked_tensor_bytes(maps[i].shape, 1);
    std::string& raw = bytes[maps[i].name];
    const auto append = [&](const auto& value) {
      raw.append(reinterpret_cast<const char*>(&value), sizeof value);
    };
    for (int64_t j = 0; j < count; ++j) {
      const uint64_t random = random_u64(3, i, static_cast<uint64_t>(j));
      if (safetensors_type_bytes(type) == 2) append(static_cast<uint16_t>(j));
      if (type == SafetensorsType::f32) append(static_cast<uint32_t>(random));
      if (type == SafetensorsType::f64)  // as an F64 file has them whose values are those of f32
        append(static_cast<double>(static_cast<int64_t>(random % 1000)) / 64);
    }
    index += (index.empty() ? "" : ", ") + json_quote(maps[i].name) + ": \"" +
             (shard == 0 ? "a" : "b") + ".safetensors\"";
  }
  const ScratchFolder source, target;
  for (int shard = 0; shard < (sharded ? 2 : 1); ++shard) {
    std::stable_sort(specs[shard].begin(), specs[shard].end(), [](const auto& a, const auto& b) {
      return safetensors_type_bytes(a.type) > safetensors_type_bytes(b.type);
    });
    const std::string name = !sharded ? "model" : shard == 0 ? "a" : "b";
    SafetensorsWriter writer(File::create_new(source / (name + ".safetensors")), specs[shard], {});
    for (const SafetensorsSpec& spec : specs[shard])
      writer.append(bytes[spec.name].data(), std::ssize(bytes[spec.name]));
    writer.finish();
  }
  if (sharded) write_bytes(source / "model.safetensors.index.json", "{\"weight_map\": {" + index + "}}");

  HfTypes types;
  const Weights weights = read(source.path(), config, model.parameters(), &types);
  types = parse_hf_types(encode_hf_types(types), "metadata");
  write_hf_weights(target.path(), config, model.parameters(), types,
                   [&](const std::string& name) { return weights.at(name); });
  const SafetensorsReader written(target / "model.safetensors");
  REQUIRE(written.tensors().size() == maps.size());
  for (int shard = 0; shard < 2; ++shard)
    for (const SafetensorsSpec& spec : specs[shard]) {
      CAPTURE(spec.name, safetensors_type_name(spec.type));
      const SafetensorsEntry& entry = written.at(spec.name);
      CHECK(entry.type == spec.type);
      std::string back(static_cast<size_t>(entry.bytes), '\0');
      written.read(entry, back.data());
      CHECK((back == bytes[spec.name]));  // not expanded: it would print megabytes
    }
}

TEST_CASE("hf_format: a value beyond its type is refused by tensor", "[checkpoint]") {
  const ModelConfig config = tiny_gqa();
  const DeepSeekModel model(config);
  Weights weights = random_weights(model.parameters());
  weights.at("model.norm.weight")[3] = 70000;
  const auto write_as = [&](SafetensorsType type) {
    const ScratchFolder folder;
    write(folder.path(), config, model.parameters(), type, weights);
  };
  CHECK_THAT(message_of([&] { write_as(SafetensorsType::f16); }),
             Catch::Contains("model.norm.weight") && Catch::Contains("F16 cannot represent"));
  write_as(SafetensorsType::bf16);
}

TEST_CASE("hf_format: types as text", "[checkpoint]") {
  HfTypes types;
  types.usual = SafetensorsType::bf16;
  CHECK(encode_hf_types(types) == "BF16");
  types.others = {{"a.b", SafetensorsType::f32}, {"c", SafetensorsType::f16}};
  CHECK(encode_hf_types(types) == "BF16\nF32 a.b\nF16 c");
  CHECK(parse_hf_types("BF16\nF32 a.b\nF16 c", "x") == types);
  for (const char* text : {"", "bf16", "I8", "BF16\n", "BF16\nF32", "BF16\nF7 a", "BF16\n\n"}) {
    CAPTURE(text);
    CHECK_THAT(message_of([&] { parse_hf_types(text, "here"); }), Catch::StartsWith("here: "));
  }
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
             Catch::Contains("mlp.gate.weight") &&
                 Catch::Contains("another shape than config.json says ([4, 8] instead of [5, 8])"));

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

  ModelConfig shallower = config;
  shallower.num_hidden_layers = 1;
  const DeepSeekModel first(shallower);
  CHECK_THAT(message_of([&] { read(folder.path(), shallower, first.parameters()); }),
             Catch::Contains("'model.layers.1.") && Catch::Contains("has no place"));
}

TEST_CASE("hf_format: prediction modules may be left out, and a tied head that is saved twice",
          "[checkpoint]") {
  ModelConfig config = tiny_mla();
  config.num_nextn_predict_layers = 1;
  const DeepSeekModel model(config);
  Weights weights = random_weights(model.parameters());
  ModelConfig tied = config;
  tied.num_nextn_predict_layers = 0;
  tied.tie_word_embeddings = true;
  const DeepSeekModel smaller(tied);
  const auto warning = [&] {
    const ScratchFolder folder;
    write(folder.path(), config, model.parameters(), SafetensorsType::f32, weights);
    std::string text;
    set_log_writer([&](std::string_view line) { text += line; });
    const size_t count = read(folder.path(), tied, smaller.parameters()).size();
    set_log_writer({});
    CHECK(count == smaller.parameters().all().size());
    return text;
  };
  CHECK_THAT(warning(), Catch::Contains("'lm_head.weight' is left out") &&
                            Catch::Contains("tie_word_embeddings"));
  weights.at("lm_head.weight") = weights.at("model.embed_tokens.weight");
  CHECK(warning() == "");
}
