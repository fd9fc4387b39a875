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
  double number(const char* key, std::optional<double> fallback = std::nullopt) const {
    if (!has(key)) return fallback ? *fallback : static_cast<double>(missing(key));
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

// "line:column: why" in our words for a JSON library that stopped at byte `stop`, counted from 1.
std::string syntax_problem(std::string_view text, size_t stop) {
  const std::string_view before = text.substr(0, stop > 0 ? stop - 1 : 0);
  const auto line = 1 + std::count(before.begin(), before.end(), '\n');
  const size_t line_start = before.rfind('\n') + 1;  // npos + 1 is 0
  std::string why = "the text ends where more must follow; is the file complete?";
  if (before.size() < text.size()) {
    const unsigned char found = static_cast<unsigned char>(text[before.size()]);
    why = found >= 0x80  ? "a byte that is not UTF-8 or stands outside of quotes"
          : found < 0x20 ? "a line break or control character within a value"
                         : fmt::format("{} is not expected here", quote(text.substr(before.size(), 1)));
  }
  return fmt::format("{}:{}: not valid JSON: {}", line, before.size() - line_start + 1, why);
}

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
  } catch (const nlohmann::json::parse_error& e) {
    throw DataError(fmt::format("{}:{}", path, syntax_problem(text, e.byte)));
  } catch (const nlohmann::json::out_of_range&) {
    throw DataError(path + ": a number is too large for a double");
  }
  if (!json.is_object()) throw DataError(path + ": must hold a JSON object");
  return json;
}

bool is_full_attention(const Json& layer_types) {
  return layer_types.is_array() &&
         std::all_of(layer_types.begin(), layer_types.end(),
                     [](const Json& type) { return type == "full_attention"; });
}

// Features of other models that change the arithmetic.
void refuse_unknown_features(const JsonObject& file, bool is_qwen2) {
  const std::string activation = file.text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish")
    file.refuse(fmt::format("hidden_act {} is not supported, only 'silu' is", quote(activation)));
  if (file.number("attention_dropout", 0.0) > 0)
    file.refuse("attention_dropout above 0 is not supported; set it to 0");
  if (file.boolean("mlp_bias", false))
    file.refuse("mlp_bias: true is not supported: the feed-forward has no biases here");
  if (file.boolean("use_sliding_window", false) ||
      (file.has("sliding_window") && !file.has("use_sliding_window") && !is_qwen2))
    file.refuse("sliding-window attention (sliding_window) is not supported");
  if (file.number("partial_rotary_factor", 1.0) != 1.0)
    file.refuse("partial_rotary_factor other than 1 is not supported");
  if (file.has("quantization_config"))
    file.refuse("quantization_config: the weights are quantised; convert them to bf16 first");
  if (file.has("layer_types") && !is_full_attention(file.json()["layer_types"]))
    file.refuse("layer_types other than 'full_attention' are not supported");
  for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping",
                          "clip_qkv", "use_qk_norm", "qk_layernorm", "index_topk"})
    if (file.has(key) && file.json()[key] != false)
      file.refuse(fmt::format("{} is not supported", key));
  if (file.integer("moe_layer_freq", 1) != 1)
    file.refuse("moe_layer_freq other than 1 is not supported: transformers ignores it");
}

RopeType read_rope_type(const JsonObject& rope) {
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (const auto known = enum_from_name<RopeType>(type)) return *known;
  const std::string why =
      type == "dynamic" ? ", and its frequencies change with the length of the text" : "";
  rope.refuse(fmt::format(
      "rope type {} is not supported: default, linear, yarn and llama3 are{}", quote(type), why));
}

void read_yarn(const JsonObject& rope, int64_t max_positions, RopeScalingConfig& r) {
  if (!rope.boolean("truncate", true)) rope.refuse("truncate: false is not supported");
  r.factor = rope.number("factor", static_cast<double>(max_positions) /
                                       static_cast<double>(r.original_max_position_embeddings));
  r.beta_fast = rope.number("beta_fast", r.beta_fast);
  r.beta_slow = rope.number("beta_slow", r.beta_slow);
  r.mscale = rope.number("mscale", 0.0);
  r.attention_factor = rope.number("attention_factor", 0.0);
}

// Where a file has both forms, transformers takes rope_scaling.
void read_rope(const JsonObject& file, ModelConfig& m) {
  const bool is_published_form = !file.object("rope_scaling").json().empty();
  const JsonObject rope = file.object(is_published_form ? "rope_scaling" : "rope_parameters");
  for (const auto& [key, value] : rope.json().items())
    if (value.is_object())
      rope.refuse("a different RoPE per kind of layer is not supported: " + quote(key));
  if (rope.number("partial_rotary_factor", 1.0) != 1.0)
    rope.refuse("partial_rotary_factor other than 1 is not supported");
  m.rope_theta = rope.number("rope_theta", file.number("rope_theta", 10000.0));
  RopeScalingConfig& r = m.rope_scaling;
  r.type = read_rope_type(rope);
  if (r.type == RopeType::none) return;
  // Beside rope_scaling it wins, as in transformers.
  const char* const original = "original_max_position_embeddings";
  r.original_max_position_embeddings =
      file.integer(original, rope.integer(original, m.max_position_embeddings));
  if (r.original_max_position_embeddings < 1) rope.refuse(fmt::format("{} must be at least 1", original));
  r.mscale_all_dim = rope.number("mscale_all_dim", 0.0);  // MLA looks at it whatever the type
  if (r.type == RopeType::yarn) return read_yarn(rope, m.max_position_embeddings, r);
  r.factor = rope.number("factor");
  if (r.type == RopeType::linear) return;
  r.low_freq_factor = rope.number("low_freq_factor");
  r.high_freq_factor = rope.number("high_freq_factor");
}

// What all families share.
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

ModelConfig read_llama(const JsonObject& file, bool is_qwen2) {
  ModelConfig m = read_common(file, is_qwen2 ? 32768 : 2048);
  if (is_qwen2) {
    m.attention_bias = true;
    m.attention_output_bias = false;
  }
  m.head_dim = file.integer("head_dim", 0);
  m.first_k_dense_replace = 0;
  m.rope_interleave = false;
  return m;
}

void refuse_unknown_family(const JsonObject& file, const std::string& family) {
  for (const char* known : {"deepseek_v3", "deepseek_v2", "llama", "qwen2"})
    if (family == known) return;
  const bool is_qwen3 = family.starts_with("qwen3");
  file.refuse(fmt::format(
      "model_type {} is not supported: deepseek_v3, deepseek_v2, llama and qwen2 are{}",
      quote(family),
      is_qwen3 ? "; it normalises queries and keys (q_norm, k_norm), which none of these does" : ""));
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

}  // namespace

ModelConfig parse_hf_config(std::string_view text, const std::string& path, bool with_mtp) {
  const Json json = parse_json(text, path);
  const JsonObject file(json, path);
  const std::string family = file.text("model_type", "");
  if (family.empty())
    file.refuse("the key 'model_type' is missing; is this a Hugging Face model folder?");
  refuse_unknown_family(file, family);
  const bool is_qwen2 = family == "qwen2";
  refuse_unknown_features(file, is_qwen2);
  const ModelConfig model = family == "deepseek_v3"   ? read_deepseek_v3(file, with_mtp)
                            : family == "deepseek_v2" ? read_deepseek_v2(file, with_mtp)
                                                      : read_llama(file, is_qwen2);
  RangeChecker checker{file};
  ModelConfig::fields(checker, model);
  return model;
}

}  // namespace dstrain
