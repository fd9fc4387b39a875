// ModelConfig to config.json: the family that computes a model, its keys, and what stays of the
// config.json that the model came with.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/config/hf_config.h"

namespace dstrain {
namespace {

using Json = nlohmann::ordered_json;

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
    if (m.has_attention_output_bias() == m.attention_bias) return "llama";
    if (m.attention_bias) return "qwen2";
    return refuse("model.attention_output_bias without model.attention_bias");
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
  Json json = {{m.is_mla() ? "type" : "rope_type", enum_name(r.type)}, {"factor", r.factor}};
  if (r.type != RopeType::linear)
    json["original_max_position_embeddings"] = r.original_max_position_embeddings;
  if (r.type == RopeType::llama3) {
    json["low_freq_factor"] = r.low_freq_factor;
    json["high_freq_factor"] = r.high_freq_factor;
  }
  if (r.type == RopeType::yarn) {
    json["beta_fast"] = r.beta_fast;
    json["beta_slow"] = r.beta_slow;
    if (r.mscale > 0) json["mscale"] = r.mscale;
    if (r.attention_factor > 0) json["attention_factor"] = r.attention_factor;
  }
  if (r.mscale_all_dim > 0) json["mscale_all_dim"] = r.mscale_all_dim;
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

// Everything that the model decides.
Json model_json(const ModelConfig& m) {
  const std::string family = family_of(m);
  const bool is_gqa = !m.is_mla();
  Json json;
  json["architectures"] = {family == "llama"         ? "LlamaForCausalLM"
                           : family == "qwen2"       ? "Qwen2ForCausalLM"
                           : family == "deepseek_v3" ? "DeepseekV3ForCausalLM"
                                                     : "DeepseekV2ForCausalLM"};
  json["model_type"] = family;
  json["vocab_size"] = m.vocab_size;
  json["hidden_size"] = m.hidden_size;
  json["num_hidden_layers"] = m.num_hidden_layers;
  json["intermediate_size"] = m.intermediate_size;
  json["num_attention_heads"] = m.num_attention_heads;
  if (is_gqa) {
    json["num_key_value_heads"] = m.kv_heads();
    json["head_dim"] = m.gqa_head_dim();
  } else {
    write_deepseek(m, family == "deepseek_v3", json);
  }
  if (family == "llama") json["mlp_bias"] = false;
  json["hidden_act"] = "silu";
  if (family != "qwen2") json["attention_bias"] = m.attention_bias;
  json["attention_dropout"] = 0.0;
  json["max_position_embeddings"] = m.max_position_embeddings;
  json["rope_theta"] = m.rope_theta;
  json["rope_scaling"] = rope_scaling_json(m);
  json["rms_norm_eps"] = m.rms_norm_eps;
  json["initializer_range"] = m.initializer_range;
  json["tie_word_embeddings"] = m.tie_word_embeddings;
  json["use_cache"] = true;
  return json;
}

// The original with what the model changed since. Of the rest only auto_map goes: it names Python files,
// which an export does not copy.
std::string revised_text(const HfConfigExtras& extras, const Json& before, const Json& now) {
  const Json original = Json::parse(extras.original);
  Json json = original;
  json.erase("auto_map");
  const auto differs = [&](const char* key) { return before.at(key) != now.at(key); };
  for (const auto& [key, value] : now.items())
    if (before.at(key) != value) json[key] = value;
  if (differs("rope_theta") || differs("rope_scaling")) {
    json.erase("rope_parameters");
    json.erase("original_max_position_embeddings");
    for (const char* key : {"rope_theta", "rope_scaling"}) json[key] = now.at(key);
  }
  if (!extras.torch_dtype.empty())
    json[json.contains("dtype") ? "dtype" : "torch_dtype"] = extras.torch_dtype;
  return json == original ? extras.original : json.dump(2) + "\n";
}

}  // namespace

std::string hf_config_text(const ModelConfig& m, const HfConfigExtras& extras) {
  DSTRAIN_CHECK(m.vocab_size > 0,
                "the vocabulary size must be resolved before a config.json is written");
  const auto id = [](const std::optional<int64_t>& value) {
    return value ? Json(*value) : Json(nullptr);
  };
  Json json = model_json(m);
  if (!extras.original.empty()) {
    const Json before =
        model_json(parse_hf_config(extras.original, extras.original_name, /*with_mtp=*/true));
    if (before["model_type"] == json["model_type"]) return revised_text(extras, before, json);
  }
  json["torch_dtype"] = extras.torch_dtype;
  json["bos_token_id"] = id(extras.bos_token_id);
  json["eos_token_id"] = id(extras.eos_token_id);
  return json.dump(2) + "\n";
}

}  // namespace dstrain
