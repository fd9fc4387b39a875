#include "core/config/presets.h"

#include <fmt/format.h>

#include "core/config/suggest.h"

namespace dstrain {
namespace {

// DeepSeek-V2-Lite's layers with the router of DeepSeek-V3.
ModelConfig v2_lite_6l() {
  ModelConfig m;
  m.vocab_size = 102400;
  m.hidden_size = 2048;
  m.num_hidden_layers = 6;
  m.intermediate_size = 10944;
  m.moe_intermediate_size = 1408;
  m.n_routed_experts = 64;
  m.n_shared_experts = 2;
  m.num_experts_per_tok = 6;
  m.num_attention_heads = 16;
  m.kv_lora_rank = 512;
  m.qk_nope_head_dim = 128;
  m.qk_rope_head_dim = 64;
  m.v_head_dim = 128;
  return m;
}

ModelConfig v2_lite() {
  ModelConfig m = v2_lite_6l();
  m.num_hidden_layers = 27;
  m.scoring_func = ScoringFunc::softmax;
  m.topk_method = TopkMethod::greedy;
  m.norm_topk_prob = false;
  m.aux_loss_alpha = 0.001;
  m.max_position_embeddings = 163840;
  m.rope_scaling.type = RopeType::yarn;
  m.rope_scaling.factor = 40.0;
  m.rope_scaling.mscale = 0.707;
  m.rope_scaling.mscale_all_dim = 0.707;
  return m;
}

ModelConfig quickstart_moe() {
  ModelConfig m;
  m.vocab_size = 4096;
  m.n_routed_experts = 16;
  m.n_shared_experts = 1;
  m.num_experts_per_tok = 4;
  m.kv_lora_rank = 64;
  m.qk_nope_head_dim = 32;
  m.qk_rope_head_dim = 16;
  m.v_head_dim = 32;
  return m;
}

ModelConfig dense_1b() {
  ModelConfig m;
  m.vocab_size = 128256;
  m.hidden_size = 2048;
  m.num_hidden_layers = 16;
  m.intermediate_size = 8192;
  m.num_attention_heads = 32;
  m.num_key_value_heads = 8;
  m.head_dim = 64;
  m.rope_theta = 500000.0;
  return m;
}

ModelConfig qwen_1_5b() {
  ModelConfig m;
  m.vocab_size = 151936;
  m.hidden_size = 1536;
  m.num_hidden_layers = 28;
  m.intermediate_size = 8960;
  m.num_attention_heads = 12;
  m.num_key_value_heads = 2;
  m.head_dim = 128;
  m.tie_word_embeddings = true;
  m.rope_theta = 1000000.0;
  return m;
}

ModelConfig deepseek_v3() {
  ModelConfig m;
  m.vocab_size = 129280;
  m.hidden_size = 7168;
  m.num_hidden_layers = 61;
  m.intermediate_size = 18432;
  m.moe_intermediate_size = 2048;
  m.first_k_dense_replace = 3;
  m.n_routed_experts = 256;
  m.n_shared_experts = 1;
  m.num_experts_per_tok = 8;
  m.n_group = 8;
  m.topk_group = 4;
  m.routed_scaling_factor = 2.5;
  m.num_attention_heads = 128;
  m.kv_lora_rank = 512;
  m.q_lora_rank = 1536;
  m.qk_nope_head_dim = 128;
  m.qk_rope_head_dim = 64;
  m.v_head_dim = 128;
  m.max_position_embeddings = 163840;
  m.rope_scaling.type = RopeType::yarn;
  m.rope_scaling.factor = 40.0;
  m.rope_scaling.mscale = 1.0;
  m.rope_scaling.mscale_all_dim = 1.0;
  m.num_nextn_predict_layers = 1;
  return m;
}

// No published model: V3's recipe at a size between V2-Lite and V3.
ModelConfig deepseek_72b() {
  ModelConfig m;
  m.vocab_size = 129280;
  m.hidden_size = 4096;
  m.num_hidden_layers = 32;
  m.intermediate_size = 11264;
  m.moe_intermediate_size = 1408;
  m.n_routed_experts = 128;
  m.n_shared_experts = 1;
  m.num_experts_per_tok = 8;
  m.n_group = 8;
  m.topk_group = 4;
  m.routed_scaling_factor = 2.5;
  m.num_attention_heads = 32;
  m.kv_lora_rank = 512;
  m.q_lora_rank = 1536;
  m.qk_nope_head_dim = 128;
  m.qk_rope_head_dim = 64;
  m.v_head_dim = 128;
  return m;
}

Preset make(const char* name, const char* description, ModelConfig model) {
  model.preset = name;
  return {name, description, std::move(model)};
}

}  // namespace

const std::vector<Preset>& presets() {
  static const std::vector<Preset> all = {
      make("quickstart-moe", "15 M: MoE with MLA that learns on a CPU in minutes",
           quickstart_moe()),
      make("v2-lite-6l", "3.4 B: six blocks of DeepSeek-V2-Lite with V3's router, for benchmarks",
           v2_lite_6l()),
      make("v2-lite", "15.7 B: DeepSeek-V2-Lite as published", v2_lite()),
      make("dense-1b", "1.5 B dense with grouped-query attention", dense_1b()),
      make("qwen-1.5b", "1.5 B dense with a tied output head", qwen_1_5b()),
      make("deepseek-72b",
           "72 B SYNTHETIC: no published model; a DeepSeek-V3-style MoE that we sized ourselves",
           deepseek_72b()),
      make("deepseek-v3", "671 B: DeepSeek-V3 as published, with its multi-token prediction module",
           deepseek_v3()),
  };
  return all;
}

std::optional<ModelConfig> find_preset(std::string_view name) {
  for (const Preset& preset : presets())
    if (preset.name == name) return preset.model;
  return std::nullopt;
}

std::string suggest_preset(std::string_view name) {
  std::vector<std::string> names;
  for (const Preset& preset : presets()) names.push_back(preset.name);
  if (const auto near = closest_word(name, names)) return fmt::format("did you mean '{}'?", *near);
  return fmt::format("presets are {}", fmt::join(names, ", "));
}

}  // namespace dstrain
