#include "core/config/hf_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "core/base/error.h"
#include "core/config/field_tree.h"
#include "core/config/problems.h"

namespace dstrain {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMaxJsonDepth = 32;

// A JSON object whose values are asked for by key, type and default. A key that is absent or null
// has its default, except where null is said to have a meaning.
class JsonObject {
 public:
  JsonObject(const Json& object, std::string path) : object_(object), path_(std::move(path)) {}

  bool has(const char* key) const { return object_.contains(key) && !object_[key].is_null(); }

  int64_t integer(const char* key, std::optional<int64_t> fallback = std::nullopt) const {
    if (!has(key)) return fallback ? *fallback : missing(key);
    const Json& value = object_[key];
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX);
    if (!fits || value.get<int64_t>() < 0) wrong(key, "a whole number of at least 0");
    return value.get<int64_t>();
  }
  double number(const char* key, double fallback) const {
    if (!has(key)) return fallback;
    if (!object_[key].is_number()) wrong(key, "a number");
    return object_[key].get<double>();
  }
  bool boolean(const char* key, bool fallback) const {
    if (!has(key)) return fallback;
    if (!object_[key].is_boolean()) wrong(key, "true or false");
    return object_[key].get<bool>();
  }
  std::string text(const char* key, const std::string& fallback) const {
    if (!has(key)) return fallback;
    if (!object_[key].is_string()) wrong(key, "text");
    return object_[key].get<std::string>();
  }
  // An empty object where the key is absent or null.
  JsonObject object(const char* key) const {
    static const Json empty = Json::object();
    if (!has(key)) return {empty, path_};
    if (!object_[key].is_object()) wrong(key, "an object");
    return {object_[key], path_ + ": " + key};
  }
  bool is_null(const char* key) const { return object_.contains(key) && object_[key].is_null(); }
  const Json& json() const { return object_; }

  [[noreturn]] void refuse(const std::string& what) const { throw DataError(path_ + ": " + what); }

 private:
  int64_t missing(const char* key) const { refuse(fmt::format("the key '{}' is missing", key)); }
  [[noreturn]] void wrong(const char* key, const char* expected) const {
    refuse(fmt::format("'{}' must be {}, got {}", key, expected,
                       quote(object_[key].dump(-1, ' ', false, Json::error_handler_t::replace))));
  }

  const Json& object_;
  std::string path_;
};

Json parse_json(std::string_view text, const std::string& path) {
  if (static_cast<int64_t>(text.size()) > kMaxHfConfigBytes)
    throw DataError(fmt::format("{}: larger than {} KiB, which no config.json is", path,
                                kMaxHfConfigBytes / 1024));
  std::vector<std::set<std::string>> keys;  // of the open objects
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxJsonDepth) throw DataError(path + ": nested too deeply");
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second)
      throw DataError(
          fmt::format("{}: the key {} is given twice", path, quote(parsed.get<std::string>())));
    return true;
  };
  Json json;
  try {
    json = Json::parse(text, watch);
  } catch (const nlohmann::json::exception& e) {
    throw DataError(path + ": not valid JSON: " + e.what());
  }
  if (!json.is_object()) throw DataError(path + ": must hold a JSON object");
  return json;
}

// Features of other models that change the arithmetic.
void refuse_unknown_features(const JsonObject& file) {
  const std::string activation = file.text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish")
    file.refuse(fmt::format("hidden_act {} is not supported, only 'silu' is", quote(activation)));
  if (file.number("attention_dropout", 0.0) > 0)
    file.refuse("attention_dropout above 0 is not supported; set it to 0");
  if (file.boolean("mlp_bias", false)) file.refuse("mlp_bias is not supported");
  if (file.boolean("use_sliding_window", false) ||
      (file.has("sliding_window") && !file.has("use_sliding_window")))
    file.refuse("sliding-window attention (sliding_window) is not supported");
  if (file.number("partial_rotary_factor", 1.0) != 1.0)
    file.refuse("partial_rotary_factor other than 1 is not supported");
  if (file.has("quantization_config"))
    file.refuse("quantization_config: the weights are quantised; convert them to bf16 first");
  for (const char* key : {"layer_types", "attn_logit_softcapping", "final_logit_softcapping",
                          "clip_qkv", "use_qk_norm", "qk_layernorm", "index_topk"})
    if (file.has(key) && file.json()[key] != false)
      file.refuse(fmt::format("{} is not supported", key));
  if (file.integer("moe_layer_freq", 1) != 1)
    file.refuse("moe_layer_freq other than 1 is not supported: transformers ignores it");
}

void read_rope(const JsonObject& file, ModelConfig& m) {
  const JsonObject rope =
      file.object(file.has("rope_parameters") ? "rope_parameters" : "rope_scaling");
  for (const auto& [key, value] : rope.json().items())
    if (value.is_object())
      rope.refuse("a different RoPE per kind of layer is not supported: " + quote(key));
  m.rope_theta = rope.number("rope_theta", file.number("rope_theta", 10000.0));
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (type == "default") return;
  if (type != "yarn")
    rope.refuse(fmt::format("rope type {} is not supported: default and yarn are", quote(type)));
  if (rope.number("partial_rotary_factor", 1.0) != 1.0)
    rope.refuse("partial_rotary_factor other than 1 is not supported");
  if (!rope.boolean("truncate", true)) rope.refuse("truncate: false is not supported");
  RopeScalingConfig& r = m.rope_scaling;
  r.type = RopeType::yarn;
  r.original_max_position_embeddings =
      rope.integer("original_max_position_embeddings", m.max_position_embeddings);
  if (r.original_max_position_embeddings < 1)
    rope.refuse("original_max_position_embeddings must be at least 1");
  r.factor = rope.number("factor", static_cast<double>(m.max_position_embeddings) /
                                       static_cast<double>(r.original_max_position_embeddings));
  r.beta_fast = rope.number("beta_fast", r.beta_fast);
  r.beta_slow = rope.number("beta_slow", r.beta_slow);
  r.mscale = rope.number("mscale", 0.0);
  r.mscale_all_dim = rope.number("mscale_all_dim", 0.0);
  r.attention_factor = rope.number("attention_factor", 0.0);
}

// What all three families share.
ModelConfig read_common(const JsonObject& file, int64_t default_positions) {
  ModelConfig m;
  m.vocab_size = file.integer("vocab_size");
  m.hidden_size = file.integer("hidden_size");
  m.num_hidden_layers = file.integer("num_hidden_layers");
  m.intermediate_size = file.integer("intermediate_size");
  m.num_attention_heads = file.integer("num_attention_heads");
  m.num_key_value_heads = file.integer("num_key_value_heads", m.num_attention_heads);
  m.attention_bias = file.boolean("attention_bias", false);
  m.max_position_embeddings = file.integer("max_position_embeddings", default_positions);
  m.rms_norm_eps = file.number("rms_norm_eps", 1e-6);
  m.tie_word_embeddings = file.boolean("tie_word_embeddings", false);
  m.initializer_range = file.number("initializer_range", 0.02);
  read_rope(file, m);
  return m;
}

void expect_name(const JsonObject& file, const char* key, const std::string& expected) {
  const std::string got = file.text(key, expected);
  if (got != expected)
    file.refuse(fmt::format("{} {} is not supported in this family, only '{}' is", key, quote(got),
                            expected));
}

// MLA and experts, for deepseek_v2 and deepseek_v3.
void read_deepseek(const JsonObject& file, bool with_mtp, ModelConfig& m) {
  if (m.num_key_value_heads != m.num_attention_heads)
    file.refuse(
        fmt::format("num_key_value_heads is {}, but MLA has one for each of the {} attention heads",
                    m.num_key_value_heads, m.num_attention_heads));
  m.num_key_value_heads = 0;
  m.kv_lora_rank = file.integer("kv_lora_rank", 512);
  m.q_lora_rank = file.is_null("q_lora_rank") ? 0 : file.integer("q_lora_rank", 1536);
  m.qk_nope_head_dim = file.integer("qk_nope_head_dim", 128);
  m.qk_rope_head_dim = file.integer("qk_rope_head_dim", 64);
  m.v_head_dim = file.integer("v_head_dim", 128);
  m.aux_loss_alpha = file.number("aux_loss_alpha", m.aux_loss_alpha);
  m.num_nextn_predict_layers = with_mtp ? file.integer("num_nextn_predict_layers", 0) : 0;
  if (m.first_k_dense_replace >= m.num_hidden_layers && m.num_nextn_predict_layers == 0) {
    m.n_routed_experts = 0;  // every block is dense
    m.n_shared_experts = 0;
    return;
  }
  m.num_experts_per_tok = file.integer("num_experts_per_tok");
  m.n_group = std::max<int64_t>(m.n_group, 1);
  m.topk_group = std::max<int64_t>(m.topk_group, 1);
}

ModelConfig read_deepseek_v3(const JsonObject& file, bool with_mtp) {
  ModelConfig m = read_common(file, 4096);
  expect_name(file, "scoring_func", "sigmoid");
  expect_name(file, "topk_method", "noaux_tc");
  m.scoring_func = ScoringFunc::sigmoid;
  m.topk_method = TopkMethod::noaux_tc;
  m.moe_intermediate_size = file.integer("moe_intermediate_size", 2048);
  m.n_routed_experts = file.integer("n_routed_experts", 256);
  m.n_shared_experts = file.integer("n_shared_experts", 1);
  m.first_k_dense_replace = file.integer("first_k_dense_replace", 3);
  m.n_group = file.integer("n_group", 8);
  m.topk_group = file.integer("topk_group", 4);
  m.norm_topk_prob = file.boolean("norm_topk_prob", true);
  m.routed_scaling_factor = file.number("routed_scaling_factor", 2.5);
  m.rope_interleave = file.boolean("rope_interleave", true);
  read_deepseek(file, with_mtp, m);
  return m;
}

ModelConfig read_deepseek_v2(const JsonObject& file, bool with_mtp) {
  ModelConfig m = read_common(file, 2048);
  expect_name(file, "scoring_func", "softmax");
  m.scoring_func = ScoringFunc::softmax;
  const std::string method = file.text("topk_method", "greedy");
  if (method != "greedy" && method != "group_limited_greedy")
    file.refuse(fmt::format("topk_method {} is not supported: greedy and group_limited_greedy are",
                            quote(method)));
  m.topk_method = *enum_from_name<TopkMethod>(method);
  // DeepSeek's own code normalises then and leaves out the scaling factor; transformers ignores it.
  if (file.boolean("norm_topk_prob", false))
    file.refuse(
        "norm_topk_prob: true is not supported in deepseek_v2: transformers ignores it there");
  m.norm_topk_prob = false;
  m.moe_intermediate_size = file.integer("moe_intermediate_size", 1407);
  m.n_routed_experts = file.integer("n_routed_experts", 64);
  m.n_shared_experts = file.integer("n_shared_experts", 2);
  m.first_k_dense_replace = file.integer("first_k_dense_replace", 0);
  const bool is_grouped = m.topk_method == TopkMethod::group_limited_greedy;
  m.n_group = is_grouped ? file.integer("n_group") : 1;
  m.topk_group = is_grouped ? file.integer("topk_group") : 1;
  m.routed_scaling_factor = file.number("routed_scaling_factor", 1.0);
  m.rope_interleave = true;
  read_deepseek(file, with_mtp, m);
  return m;
}

ModelConfig read_llama(const JsonObject& file) {
  ModelConfig m = read_common(file, 2048);
  m.head_dim = file.integer("head_dim", 0);
  m.first_k_dense_replace = 0;
  m.rope_interleave = false;
  return m;
}

// The ranges of the job file's keys hold here too.
struct RangeChecker {
  const JsonObject& file;

  void operator()(const char* name, const int64_t& value, const Range& range, const char*) {
    check(name, static_cast<double>(value), range);
  }
  void operator()(const char* name, const double& value, const Range& range, const char*) {
    check(name, value, range);
  }
  void operator()(const char*, const RopeScalingConfig& value, const Range&, const char*) {
    RopeScalingConfig::fields(*this, value);
  }
  void operator()(const char*, const auto&, const Range&, const char*) {}

  void check(const char* name, double value, const Range& range) const {
    if (!range.contains(value))
      file.refuse(fmt::format("{} must be {}, got {}", name, range_text(range), value));
  }
};

// The family that computes `m`, or a ConfigError that says why there is none.
std::string family_of(const ModelConfig& m) {
  const auto refuse = [](const std::string& why) -> std::string {
    throw ConfigError("this model has no Hugging Face family: " + why);
  };
  if (m.moe_layer_freq != 1)
    return refuse(
        fmt::format("model.moe_layer_freq is {}, transformers knows 1 only", m.moe_layer_freq));
  if (!m.is_mla()) {
    if (m.n_routed_experts > 0)
      return refuse("experts need MLA (model.kv_lora_rank above 0) there");
    if (m.rope_is_interleaved())
      return refuse("model.rope_interleave is true, llama has half-split pairs");
    return "llama";
  }
  const bool is_v3_router =
      m.scoring_func == ScoringFunc::sigmoid && m.topk_method == TopkMethod::noaux_tc;
  if (m.n_routed_experts == 0 || is_v3_router) return "deepseek_v3";
  if (m.scoring_func != ScoringFunc::softmax || m.topk_method == TopkMethod::noaux_tc)
    return refuse(fmt::format("model.scoring_func {} with model.topk_method {}",
                              enum_name(m.scoring_func), enum_name(m.topk_method)));
  if (m.norm_topk_prob)
    return refuse("model.norm_topk_prob with softmax scores, which deepseek_v2 ignores");
  if (!m.rope_is_interleaved())
    return refuse("model.rope_interleave is false, deepseek_v2 has neighbouring pairs");
  return "deepseek_v2";
}

Json rope_scaling_json(const ModelConfig& m) {
  const RopeScalingConfig& r = m.rope_scaling;
  if (r.type == RopeType::none) return nullptr;
  Json json = {{m.is_mla() ? "type" : "rope_type", "yarn"},
               {"factor", r.factor},
               {"original_max_position_embeddings", r.original_max_position_embeddings},
               {"beta_fast", r.beta_fast},
               {"beta_slow", r.beta_slow}};
  if (r.mscale > 0) json["mscale"] = r.mscale;
  if (r.mscale_all_dim > 0) json["mscale_all_dim"] = r.mscale_all_dim;
  if (r.attention_factor > 0) json["attention_factor"] = r.attention_factor;
  return json;
}

void write_deepseek(const ModelConfig& m, bool is_v3, Json& json) {
  const bool is_dense = m.n_routed_experts == 0;
  const auto or_null = [](int64_t value) { return value > 0 ? Json(value) : Json(nullptr); };
  json["moe_intermediate_size"] = m.moe_intermediate_size;
  // The families have no dense model: one whose leading dense blocks are all blocks is the same.
  json["first_k_dense_replace"] = is_dense ? m.num_hidden_layers : m.first_k_dense_replace;
  json["moe_layer_freq"] = 1;
  json["n_routed_experts"] = is_dense ? 1 : m.n_routed_experts;
  json["n_shared_experts"] = is_dense ? 1 : m.n_shared_experts;
  json["num_experts_per_tok"] = is_dense ? 1 : m.num_experts_per_tok;
  json["n_group"] = is_dense ? 1 : m.n_group;
  json["topk_group"] = is_dense ? 1 : m.topk_group;
  json["topk_method"] = is_v3 ? "noaux_tc" : std::string(enum_name(m.topk_method));
  json["scoring_func"] = is_v3 ? "sigmoid" : "softmax";
  json["norm_topk_prob"] = m.norm_topk_prob;
  json["routed_scaling_factor"] = m.routed_scaling_factor;
  json["aux_loss_alpha"] = m.aux_loss_alpha;
  json["seq_aux"] = true;
  json["num_key_value_heads"] = m.num_attention_heads;
  json["kv_lora_rank"] = m.kv_lora_rank;
  json["q_lora_rank"] = or_null(m.q_lora_rank);
  json["qk_nope_head_dim"] = m.qk_nope_head_dim;
  json["qk_rope_head_dim"] = m.qk_rope_head_dim;
  json["v_head_dim"] = m.v_head_dim;
  if (!is_v3) return;
  json["rope_interleave"] = m.rope_is_interleaved();
  json["num_nextn_predict_layers"] = m.num_nextn_predict_layers;
}

}  // namespace

ModelConfig parse_hf_config(std::string_view text, const std::string& path, bool with_mtp) {
  const Json json = parse_json(text, path);
  const JsonObject file(json, path);
  const std::string family = file.text("model_type", "");
  if (family.empty())
    file.refuse("the key 'model_type' is missing; is this a Hugging Face model folder?");
  if (family != "deepseek_v3" && family != "deepseek_v2" && family != "llama")
    file.refuse(fmt::format(
        "model_type {} is not supported: deepseek_v3, deepseek_v2 and llama are", quote(family)));
  refuse_unknown_features(file);
  const ModelConfig model = family == "deepseek_v3"   ? read_deepseek_v3(file, with_mtp)
                            : family == "deepseek_v2" ? read_deepseek_v2(file, with_mtp)
                                                      : read_llama(file);
  RangeChecker checker{file};
  ModelConfig::fields(checker, model);
  return model;
}

std::string hf_config_text(const ModelConfig& m, const HfConfigExtras& extras) {
  DSTRAIN_CHECK(m.vocab_size > 0,
                "the vocabulary size must be resolved before a config.json is written");
  const std::string family = family_of(m);
  const auto id = [](const std::optional<int64_t>& value) {
    return value ? Json(*value) : Json(nullptr);
  };
  Json json;
  json["architectures"] = {family == "llama"         ? "LlamaForCausalLM"
                           : family == "deepseek_v3" ? "DeepseekV3ForCausalLM"
                                                     : "DeepseekV2ForCausalLM"};
  json["model_type"] = family;
  json["torch_dtype"] = extras.torch_dtype;
  json["vocab_size"] = m.vocab_size;
  json["hidden_size"] = m.hidden_size;
  json["num_hidden_layers"] = m.num_hidden_layers;
  json["intermediate_size"] = m.intermediate_size;
  json["num_attention_heads"] = m.num_attention_heads;
  if (family == "llama") {
    json["num_key_value_heads"] = m.kv_heads();
    json["head_dim"] = m.gqa_head_dim();
    json["mlp_bias"] = false;
  } else {
    write_deepseek(m, family == "deepseek_v3", json);
  }
  json["hidden_act"] = "silu";
  json["attention_bias"] = m.attention_bias;
  json["attention_dropout"] = 0.0;
  json["max_position_embeddings"] = m.max_position_embeddings;
  json["rope_theta"] = m.rope_theta;
  json["rope_scaling"] = rope_scaling_json(m);
  json["rms_norm_eps"] = m.rms_norm_eps;
  json["initializer_range"] = m.initializer_range;
  json["tie_word_embeddings"] = m.tie_word_embeddings;
  json["use_cache"] = true;
  json["bos_token_id"] = id(extras.bos_token_id);
  json["eos_token_id"] = id(extras.eos_token_id);
  return json.dump(2) + "\n";
}

}  // namespace dstrain
