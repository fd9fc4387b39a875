// Hugging Face config.json, read and written.
#include "core/config/hf_config.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/config/config_io.h"
#include "core/config/presets.h"
#include "test/support/catch.h"

using namespace dstrain;
using Json = nlohmann::json;

namespace {

std::string read_data(const std::string& name) {
  std::ifstream file(std::string(DSTRAIN_TEST_DATA) + "/parity/" + name + "/config.json");
  REQUIRE(file);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// A file's JSON with keys changed; a discarded value removes the key.
std::string with(const std::string& name, const Json& changes,
                 const std::vector<std::string>& removed = {}) {
  Json json = Json::parse(read_data(name));
  json.update(changes);
  for (const std::string& key : removed) json.erase(key);
  return json.dump();
}

ModelConfig parse(const std::string& text) {
  return parse_hf_config(text, "config.json");
}

std::string error_of(const std::string& text) {
  try {
    parse(text);
  } catch (const DataError& e) {
    return e.what();
  }
  return "(accepted)";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::string revised(const ModelConfig& model, const std::string& original,
                    const std::string& torch_dtype = "") {
  HfConfigExtras extras;
  extras.torch_dtype = torch_dtype;
  extras.original = original;
  extras.original_name = "config.json";
  return hf_config_text(model, extras);
}

// Equal in every key of the job file.
void check_equal(const ModelConfig& a, const ModelConfig& b) {
  Config left, right;
  left.model = a;
  right.model = b;
  const std::vector<std::string> differences = diff_config(left, right);
  CAPTURE(differences);
  CHECK(differences.empty());
}

}  // namespace

TEST_CASE("hf config: deepseek_v3 as transformers 5 writes it", "[config]") {
  const ModelConfig m = parse(read_data("deepseek_v3_tiny"));
  CHECK(m.is_mla());
  CHECK(m.vocab_size == 256);
  CHECK(m.q_lora_rank == 32);
  CHECK(m.kv_lora_rank == 24);
  CHECK(m.qk_dim() == 24);
  CHECK(m.v_dim() == 16);
  CHECK(m.n_routed_experts == 8);
  CHECK(m.n_group == 2);
  CHECK(m.topk_group == 1);
  CHECK(m.scoring_func == ScoringFunc::sigmoid);
  CHECK(m.topk_method == TopkMethod::noaux_tc);
  CHECK(m.norm_topk_prob);
  CHECK(m.routed_scaling_factor == 2.5);
  CHECK(m.rope_is_interleaved());
  CHECK(m.num_nextn_predict_layers == 0);
  CHECK(parse_hf_config(read_data("deepseek_v3_tiny"), "config.json", /*with_mtp=*/true)
            .num_nextn_predict_layers == 1);
}

TEST_CASE("hf config: llama as transformers 5 writes it", "[config]") {
  const ModelConfig m = parse(read_data("llama_tiny"));
  CHECK_FALSE(m.is_mla());
  CHECK(m.kv_heads() == 2);
  CHECK(m.gqa_head_dim() == 16);
  CHECK(m.n_routed_experts == 0);
  CHECK_FALSE(m.rope_is_interleaved());
  CHECK(m.tie_word_embeddings);
}

TEST_CASE("hf config: both forms of RoPE", "[config]") {
  const Json yarn = {
      {"type", "yarn"},       {"factor", 40},   {"original_max_position_embeddings", 4096},
      {"beta_fast", 32},      {"beta_slow", 1}, {"mscale", 0.707},
      {"mscale_all_dim", 0.5}};
  const auto published = [&](const Json& scaling) {
    return parse(with(
        "deepseek_v3_tiny",
        {{"rope_theta", 20000}, {"rope_scaling", scaling}, {"max_position_embeddings", 163840}},
        {"rope_parameters"}));
  };
  CHECK(published(nullptr).rope_theta == 20000);
  CHECK(published(nullptr).rope_scaling.type == RopeType::none);
  const RopeScalingConfig r = published(yarn).rope_scaling;
  CHECK(r.type == RopeType::yarn);
  CHECK(r.factor == 40);
  CHECK(r.mscale == 0.707);
  CHECK(r.mscale_all_dim == 0.5);
  CHECK(r.original_max_position_embeddings == 4096);
  Json parameters = yarn;
  parameters.erase("type");
  parameters["rope_type"] = "yarn";
  parameters["rope_theta"] = 20000;
  check_equal(parse(with("deepseek_v3_tiny",
                         {{"rope_parameters", parameters}, {"max_position_embeddings", 163840}})),
              published(yarn));
  // What a file leaves out is what transformers takes.
  const ModelConfig sparse = published(
      {{"rope_type", "yarn"}, {"original_max_position_embeddings", 4096}, {"mscale", nullptr}});
  CHECK(sparse.rope_scaling.factor == 40);
  CHECK(sparse.rope_scaling.beta_fast == 32);
  CHECK(sparse.rope_scaling.mscale == 0);
}

TEST_CASE("hf config: the rotary scaling of Llama 3.1, and linear", "[config]") {
  const Json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.5},
                       {"high_freq_factor", 5.0},
                       {"original_max_position_embeddings", 8192}};
  const auto published = [](const Json& scaling, const Json& more = Json::object()) {
    Json all = {{"rope_theta", 500000.0}, {"rope_scaling", scaling}};
    all.update(more);
    return with("llama_tiny", all, {"rope_parameters"});
  };
  const ModelConfig m = parse(published(llama3));
  CHECK(m.rope_theta == 500000);
  CHECK(m.rope_scaling.type == RopeType::llama3);
  CHECK(m.rope_scaling.factor == 8);
  CHECK(m.rope_scaling.low_freq_factor == 1.5);
  CHECK(m.rope_scaling.high_freq_factor == 5);
  CHECK(m.rope_scaling.original_max_position_embeddings == 8192);
  Json parameters = llama3;
  parameters["rope_theta"] = 500000.0;
  check_equal(parse(with("llama_tiny", {{"rope_parameters", parameters}})), m);
  check_equal(parse(hf_config_text(m, {})), m);

  const ModelConfig linear = parse(published({{"type", "linear"}, {"factor", 2.5}}));
  CHECK(linear.rope_scaling.type == RopeType::linear);
  CHECK(linear.rope_scaling.factor == 2.5);
  check_equal(parse(hf_config_text(linear, {})), linear);
  CHECK(parse(published({{"rope_type", "default"}})).rope_scaling.type == RopeType::none);

  // What transformers does with both forms at once, and with the original length beside them.
  CHECK(parse(with("llama_tiny", {{"rope_scaling", {{"type", "linear"}, {"factor", 3}}}}))
            .rope_scaling.factor == 3);
  CHECK(parse(with("llama_tiny", {{"rope_scaling", Json::object()}})).rope_scaling.type ==
        RopeType::none);
  CHECK(parse(published(llama3, {{"original_max_position_embeddings", 4096}}))
            .rope_scaling.original_max_position_embeddings == 4096);
}

TEST_CASE("hf config: qwen2 is llama without a bias in the output projection", "[config]") {
  // sliding_window without use_sliding_window is off there.
  const ModelConfig m = parse(
      with("llama_tiny", {{"model_type", "qwen2"}, {"sliding_window", 4096}}, {"attention_bias"}));
  CHECK(m.attention_bias);
  CHECK_FALSE(m.has_attention_output_bias());
  const Json json = Json::parse(hf_config_text(m, {}));
  CHECK(json["model_type"] == "qwen2");
  CHECK(json["architectures"] == Json({"Qwen2ForCausalLM"}));
  CHECK_FALSE(json.contains("attention_bias"));
  check_equal(parse(json.dump()), m);
  CHECK(parse(with("llama_tiny", {{"attention_bias", true}})).has_attention_output_bias());
}

TEST_CASE("hf config: an original comes back, but for what changed", "[config]") {
  for (const char* name : {"deepseek_v3_tiny", "llama_tiny", "llama_yarn_bias"}) {
    CAPTURE(name);
    // Without a module for multi-token prediction, whose weights are not there.
    const std::string text =
        with(name, {{"num_nextn_predict_layers", 0}, {"some_later_key", {{"x", {1, "\u00e9"}}}}});
    CHECK(revised(parse(text), text) == text);
  }
  const std::string published =
      with("llama_tiny",
           {{"dtype", "float16"}, {"eos_token_id", {1, 2}}, {"auto_map", {{"AutoConfig", "x.py"}}}});
  ModelConfig m = parse(published);
  m.max_position_embeddings = 4096;
  Json expected = Json::parse(published);
  expected.erase("auto_map");
  expected["max_position_embeddings"] = 4096;
  CHECK(Json::parse(revised(m, published)) == expected);
  expected["dtype"] = "bfloat16";
  CHECK(Json::parse(revised(m, published, "bfloat16")) == expected);
  // One form of RoPE: the published one, where it changed.
  m.rope_theta = 20000;
  expected.erase("rope_parameters");
  expected["rope_theta"] = 20000.0;
  expected["rope_scaling"] = nullptr;
  CHECK(Json::parse(revised(m, published, "bfloat16")) == expected);
  // Prediction modules were not imported.
  const std::string v3 = read_data("deepseek_v3_tiny");
  REQUIRE(Json::parse(v3)["num_nextn_predict_layers"] == 1);
  Json without = Json::parse(v3);
  without["num_nextn_predict_layers"] = 0;
  CHECK(Json::parse(revised(parse(v3), v3)) == without);
}

TEST_CASE("hf config: deepseek_v2 routes as transformers does", "[config]") {
  const auto v2 = [](const Json& changes) {
    Json all = {
        {"model_type", "deepseek_v2"}, {"norm_topk_prob", false}, {"topk_method", "greedy"}};
    all.update(changes);
    return with("deepseek_v3_tiny", all);
  };
  const ModelConfig greedy = parse(v2({{"n_group", 8}, {"q_lora_rank", nullptr}}));
  CHECK(greedy.scoring_func == ScoringFunc::softmax);
  CHECK(greedy.topk_method == TopkMethod::greedy);
  CHECK(greedy.n_group == 1);  // greedy ignores groups
  CHECK_FALSE(greedy.norm_topk_prob);
  CHECK(greedy.q_lora_rank == 0);
  CHECK(greedy.rope_is_interleaved());
  const ModelConfig grouped =
      parse(v2({{"topk_method", "group_limited_greedy"}, {"n_group", 4}, {"topk_group", 2}}));
  CHECK(grouped.topk_method == TopkMethod::group_limited_greedy);
  CHECK(grouped.n_group == 4);
  CHECK(grouped.topk_group == 2);
  CHECK(contains(error_of(v2({{"norm_topk_prob", true}})),
                 "norm_topk_prob: true is not supported in deepseek_v2"));
  CHECK(contains(error_of(v2({{"topk_method", "noaux_tc"}})),
                 "topk_method 'noaux_tc' is not supported"));
  CHECK(contains(error_of(v2({{"topk_method", "group_limited_greedy"}, {"n_group", nullptr}})),
                 "'n_group' is missing"));
}

TEST_CASE("hf config: what is not supported is refused by name", "[config]") {
  const auto changed = [](const char* key, const Json& value) {
    return error_of(with("deepseek_v3_tiny", {{key, value}}));
  };
  CHECK(
      contains(changed("model_type", "gemma"), "config.json: model_type 'gemma' is not supported"));
  CHECK(contains(changed("model_type", "qwen3"), "model_type 'qwen3' is not supported"));
  CHECK(contains(changed("model_type", "qwen3"), "q_norm, k_norm"));
  CHECK(contains(changed("hidden_act", "gelu"), "hidden_act 'gelu'"));
  CHECK(contains(changed("attention_dropout", 0.1), "attention_dropout"));
  CHECK(contains(changed("mlp_bias", true), "mlp_bias"));
  CHECK(contains(changed("sliding_window", 4096), "sliding_window"));
  CHECK(contains(changed("use_sliding_window", true), "sliding_window"));
  CHECK(contains(changed("quantization_config", {{"quant_method", "fp8"}}), "quantization_config"));
  CHECK(contains(changed("scoring_func", "softmax"), "scoring_func 'softmax'"));
  CHECK(contains(changed("topk_method", "greedy"), "topk_method 'greedy'"));
  CHECK(contains(changed("moe_layer_freq", 2), "moe_layer_freq"));
  CHECK(
      contains(changed("num_key_value_heads", 2), "MLA has one for each of the 4 attention heads"));
  CHECK(contains(changed("partial_rotary_factor", 0.5), "partial_rotary_factor"));
  CHECK(contains(changed("layer_types", {"full_attention", "sliding_attention"}), "layer_types"));
  CHECK(contains(changed("rope_parameters", {{"rope_type", "longrope"}}), "rope type 'longrope'"));
  CHECK(contains(changed("rope_parameters", {{"rope_type", "dynamic"}}),
                 "rope type 'dynamic' is not supported: default, linear, yarn and llama3 are, and "
                 "its frequencies change with the length"));
  CHECK(contains(changed("rope_parameters", {{"rope_type", "llama3"}, {"factor", 8}}),
                 "rope_parameters: the key 'low_freq_factor' is missing"));
  CHECK(contains(changed("rope_parameters", {{"rope_type", "linear"}}),
                 "rope_parameters: the key 'factor' is missing"));
  CHECK(contains(changed("rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}),
                 "different RoPE per kind of layer"));
  CHECK(contains(changed("rope_parameters", {{"rope_type", "yarn"}, {"truncate", false}}),
                 "truncate"));
  // Harmless keys of other versions are no reason to refuse a file.
  CHECK(changed("sliding_window", nullptr) == "(accepted)");
  CHECK(changed("layer_types", {"full_attention", "full_attention"}) == "(accepted)");
  CHECK(changed("output_router_logits", false) == "(accepted)");
}

TEST_CASE("hf config: malformed files", "[config]") {
  const std::string incomplete =
      "not valid JSON: the text ends where more must follow; is the file complete?";
  CHECK(error_of("") == "config.json:1:1: " + incomplete);
  CHECK(error_of("{") == "config.json:1:2: " + incomplete);
  CHECK(error_of("{\n  \"a\": [1,\n") == "config.json:3:1: " + incomplete);
  CHECK(error_of("{\n  \"a\": 1,\n}") ==
        "config.json:3:1: not valid JSON: '}' is not expected here");
  CHECK(error_of("{\"a\" x}") == "config.json:1:6: not valid JSON: 'x' is not expected here");
  CHECK(contains(error_of("{\"a\": \"b\n\"}"), "config.json:1:9: not valid JSON: a line break"));
  CHECK(contains(error_of("{\"a\": 1e999}"), "a number is too large"));
  CHECK(contains(error_of("[1]"), "must hold a JSON object"));
  CHECK(contains(error_of("{}"), "'model_type' is missing"));
  CHECK(contains(error_of(R"({"model_type": "llama", "model_type": "llama"})"),
                 "'model_type' is given twice"));
  CHECK(contains(error_of(std::string(100000, '[')), "config.json: "));
  CHECK(contains(error_of("{\"a\": " + std::string(200, '[') + std::string(200, ']') + "}"),
                 "nested too deeply"));
  CHECK(contains(error_of(std::string(2000000, ' ')), "larger than 1024 KiB"));
  CHECK(contains(error_of("{\"model_type\": \"\xFF\"}"),
                 "config.json:1:17: not valid JSON: a byte that is not UTF-8"));
  const auto changed = [](const char* key, const Json& value) {
    return error_of(with("llama_tiny", {{key, value}}));
  };
  CHECK(contains(changed("hidden_size", "64"),
                 "'hidden_size' must be a whole number of at least 0, got '\"64\"'"));
  CHECK(contains(changed("hidden_size", -64), "'hidden_size' must be a whole number"));
  CHECK(contains(changed("hidden_size", 64.5), "'hidden_size' must be a whole number"));
  CHECK(contains(changed("hidden_size", 18446744073709551615ull),
                 "'hidden_size' must be a whole number"));
  CHECK(contains(changed("hidden_size", 0), "hidden_size must be 1 to 1048576, got 0"));
  CHECK(contains(changed("num_attention_heads", 0), "num_attention_heads must be 1 to"));
  CHECK(contains(changed("rms_norm_eps", 0), "rms_norm_eps must be above 0"));
  CHECK(contains(changed("rms_norm_eps", true), "'rms_norm_eps' must be a number"));
  CHECK(contains(changed("tie_word_embeddings", 1), "'tie_word_embeddings' must be true or false"));
  CHECK(contains(changed("rope_parameters", 3), "'rope_parameters' must be an object"));
  CHECK(contains(error_of(with("llama_tiny", Json::object(), {"hidden_size"})),
                 "the key 'hidden_size' is missing"));
}

TEST_CASE("hf config: what is written reads back as the same model", "[config]") {
  for (const Preset& preset : presets()) {
    CAPTURE(preset.name);
    const std::string text = hf_config_text(preset.model, {});
    ModelConfig back = parse_hf_config(text, "config.json", /*with_mtp=*/true);
    // Spelled-out defaults and keys that the file has no place for.
    ModelConfig expected = preset.model;
    expected.preset.clear();
    expected.rope_interleave = expected.rope_is_interleaved();
    if (!expected.is_mla()) {
      expected.num_key_value_heads = expected.kv_heads();
      expected.head_dim = expected.gqa_head_dim();
      expected.first_k_dense_replace = 0;
    }
    check_equal(back, expected);
  }
  for (const char* name : {"deepseek_v3_tiny", "llama_tiny"}) {
    const ModelConfig model = parse(read_data(name));
    check_equal(parse(hf_config_text(model, {})), model);
  }
}

TEST_CASE("hf config: the published form, with its names", "[config]") {
  HfConfigExtras extras;
  extras.torch_dtype = "float32";
  extras.bos_token_id = 0;
  const Json v3 = Json::parse(hf_config_text(*find_preset("deepseek-v3"), extras));
  CHECK(v3["architectures"] == Json({"DeepseekV3ForCausalLM"}));
  CHECK(v3["model_type"] == "deepseek_v3");
  CHECK(v3["torch_dtype"] == "float32");
  CHECK(v3["rope_scaling"]["type"] == "yarn");
  CHECK(v3["rope_theta"] == 10000.0);
  CHECK(v3["q_lora_rank"] == 1536);
  CHECK(v3["bos_token_id"] == 0);
  CHECK(v3["eos_token_id"].is_null());
  CHECK(v3["num_key_value_heads"] == 128);
  CHECK(Json::parse(hf_config_text(*find_preset("v2-lite"), {}))["q_lora_rank"].is_null());
  CHECK(Json::parse(hf_config_text(*find_preset("v2-lite"), {}))["model_type"] == "deepseek_v2");
  CHECK(Json::parse(hf_config_text(*find_preset("dense-1b"), {}))["model_type"] == "llama");

  // A dense model with MLA is a deepseek_v3 whose blocks are all leading dense ones.
  ModelConfig dense_mla = *find_preset("v2-lite-6l");
  dense_mla.n_routed_experts = dense_mla.n_shared_experts = dense_mla.num_experts_per_tok = 0;
  const ModelConfig back = parse(hf_config_text(dense_mla, {}));
  CHECK(back.n_routed_experts == 0);
  CHECK(back.is_mla());
}

TEST_CASE("hf config: a model without a family is refused", "[config]") {
  const auto refused = [](void (*change)(ModelConfig&)) -> std::string {
    ModelConfig model = *find_preset("v2-lite");
    change(model);
    try {
      return hf_config_text(model, {});
    } catch (const ConfigError& e) {
      return e.what();
    }
  };
  CHECK(contains(refused([](ModelConfig& m) { m.moe_layer_freq = 2; }), "moe_layer_freq is 2"));
  CHECK(contains(refused([](ModelConfig& m) { m.norm_topk_prob = true; }), "norm_topk_prob"));
  CHECK(contains(refused([](ModelConfig& m) { m.scoring_func = ScoringFunc::sigmoid; }),
                 "sigmoid with model.topk_method greedy"));
  CHECK(contains(refused([](ModelConfig& m) { m.rope_interleave = false; }),
                 "rope_interleave is false"));
  CHECK(contains(refused([](ModelConfig& m) { m.kv_lora_rank = 0; }), "experts need MLA"));
}
