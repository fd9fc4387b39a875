// The section `model`. Field names are those of a Hugging Face config.json.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/config/field.h"

namespace dstrain {

enum class ScoringFunc { softmax, sigmoid };
DSTRAIN_ENUM_NAMES(ScoringFunc, {ScoringFunc::softmax, "softmax"},
                   {ScoringFunc::sigmoid, "sigmoid"});

enum class TopkMethod { greedy, group_limited_greedy, noaux_tc };
DSTRAIN_ENUM_NAMES(TopkMethod, {TopkMethod::greedy, "greedy"},
                   {TopkMethod::group_limited_greedy, "group_limited_greedy"},
                   {TopkMethod::noaux_tc, "noaux_tc"});

enum class RopeType { none, linear, yarn, llama3 };
DSTRAIN_ENUM_NAMES(RopeType, {RopeType::none, "default"}, {RopeType::linear, "linear"},
                   {RopeType::yarn, "yarn"}, {RopeType::llama3, "llama3"});

// rope_scaling of the published files (rope_parameters of transformers 5).
struct RopeScalingConfig {
  RopeType type = RopeType::none;
  double factor = 1.0;
  int64_t original_max_position_embeddings = 4096;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double mscale = 0.0;            // 0 = absent
  double mscale_all_dim = 0.0;    // 0 = absent
  double attention_factor = 0.0;  // 0 = derived from factor and mscale
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;

  static void fields(auto& field, auto& c) {
    field(
        "type", c.type, any(),
        "default (no scaling), linear (all frequencies divided by the factor), yarn or llama3 (as "
        "Llama 3.1)");
    field("factor", c.factor, at_least(1.0), "context length extension factor");
    field("original_max_position_embeddings", c.original_max_position_embeddings,
          in_range(1, 1 << 30), "context length before extension");
    field("beta_fast", c.beta_fast, above(0.0), "YaRN: rotations above which nothing changes");
    field("beta_slow", c.beta_slow, above(0.0), "YaRN: rotations below which all is interpolated");
    field("mscale", c.mscale, at_least(0.0),
          "YaRN: attention temperature of cos and sin; 0 = absent");
    field("mscale_all_dim", c.mscale_all_dim, at_least(0.0),
          "YaRN: attention temperature of the whole score; 0 = absent");
    field("attention_factor", c.attention_factor, at_least(0.0),
          "YaRN: scale of cos and sin; 0 = derived from factor and mscale");
    field("low_freq_factor", c.low_freq_factor, above(0.0),
          "llama3: rotations below which all is interpolated");
    field("high_freq_factor", c.high_freq_factor, above(0.0),
          "llama3: rotations above which nothing changes");
  }
};

struct ModelConfig {
  std::string preset;      // a named set of the values below, applied first
  std::string from;        // a Hugging Face folder whose config.json and weights to start from
  int64_t vocab_size = 0;  // 0 = the tokenizer's
  int64_t hidden_size = 256;
  int64_t num_hidden_layers = 6;
  int64_t intermediate_size = 704;
  int64_t moe_intermediate_size = 176;
  int64_t first_k_dense_replace = 1;
  int64_t moe_layer_freq = 1;
  int64_t n_routed_experts = 0;  // 0 makes every layer dense
  int64_t n_shared_experts = 0;
  int64_t num_experts_per_tok = 0;
  int64_t n_group = 1;
  int64_t topk_group = 1;
  TopkMethod topk_method = TopkMethod::noaux_tc;
  ScoringFunc scoring_func = ScoringFunc::sigmoid;
  bool norm_topk_prob = true;
  double routed_scaling_factor = 1.0;
  double bias_update_speed = 0.001;  // auxiliary-loss-free balancing; 0 keeps the bias
  double aux_loss_alpha = 0.0001;    // sequence-wise balance loss; 0 = none
  int64_t num_attention_heads = 4;
  int64_t num_key_value_heads = 0;  // 0 = num_attention_heads
  int64_t head_dim = 0;             // 0 = hidden_size / num_attention_heads; GQA only
  int64_t kv_lora_rank = 0;         // above 0 makes attention MLA
  int64_t q_lora_rank = 0;          // 0 or null = queries are not compressed
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  bool attention_bias = false;
  std::optional<bool> attention_output_bias;  // default: as attention_bias; GQA only
  double rope_theta = 10000.0;
  std::optional<bool> rope_interleave;  // default: true with MLA, false otherwise
  RopeScalingConfig rope_scaling;
  int64_t max_position_embeddings = 4096;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  double initializer_range = 0.02;
  int64_t num_nextn_predict_layers = 0;
  double mtp_loss_weight = 0.3;

  bool is_mla() const { return kv_lora_rank > 0; }
  bool is_moe_layer(int64_t layer) const {
    return n_routed_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
  int64_t kv_heads() const {
    return num_key_value_heads > 0 ? num_key_value_heads : num_attention_heads;
  }
  // Width of one query head, of one value head, and the rotated part of a query head.
  int64_t qk_dim() const { return is_mla() ? qk_nope_head_dim + qk_rope_head_dim : gqa_head_dim(); }
  int64_t v_dim() const { return is_mla() ? v_head_dim : gqa_head_dim(); }
  int64_t rope_dim() const { return is_mla() ? qk_rope_head_dim : gqa_head_dim(); }
  int64_t gqa_head_dim() const {
    return head_dim > 0 ? head_dim : hidden_size / num_attention_heads;
  }
  bool has_attention_output_bias() const { return attention_output_bias.value_or(attention_bias); }
  bool rope_is_interleaved() const { return rope_interleave.value_or(is_mla()); }

  static void fields(auto& field, auto& c);  // below
};

void ModelConfig::fields(auto& field, auto& c) {
  field("preset", c.preset, any(), "named architecture whose values the other keys override");
  field("from", c.from, any(), "Hugging Face folder to take config.json and initial weights from");
  field("vocab_size", c.vocab_size, in_range(0, 1 << 24).or_null(),
        "rows of the embedding; 0 takes the tokenizer's");
  field("hidden_size", c.hidden_size, in_range(1, 1 << 20), "width of the residual stream");
  field("num_hidden_layers", c.num_hidden_layers, in_range(1, 10000), "transformer blocks");
  field("intermediate_size", c.intermediate_size, in_range(1, 1 << 22),
        "width of a dense feed-forward");
  field("moe_intermediate_size", c.moe_intermediate_size, in_range(1, 1 << 22),
        "width of one expert");
  field("first_k_dense_replace", c.first_k_dense_replace, in_range(0, 10000),
        "leading blocks that are dense");
  field("moe_layer_freq", c.moe_layer_freq, in_range(1, 10000),
        "every n-th block after those is a MoE");
  field("n_routed_experts", c.n_routed_experts, in_range(0, 65536).or_null(),
        "routed experts; 0 makes every block dense");
  field("n_shared_experts", c.n_shared_experts, in_range(0, 1024).or_null(),
        "always-on experts, run as one wide feed-forward");
  field("num_experts_per_tok", c.num_experts_per_tok, in_range(0, 1024).or_null(),
        "routed experts per token");
  field("n_group", c.n_group, in_range(1, 65536), "expert groups of group-limited routing");
  field("topk_group", c.topk_group, in_range(1, 65536), "groups a token may use");
  field("topk_method", c.topk_method, any(),
        "greedy, group_limited_greedy (by a group's best score) or noaux_tc (bias-corrected, by "
        "its best two)");
  field("scoring_func", c.scoring_func, any(), "router scores: softmax or sigmoid");
  field("norm_topk_prob", c.norm_topk_prob, any(), "chosen scores are divided by their sum");
  field("routed_scaling_factor", c.routed_scaling_factor, above(0.0), "multiplies the routed sum");
  field("bias_update_speed", c.bias_update_speed, at_least(0.0),
        "step of the auxiliary-loss-free balancing bias (noaux_tc); 0 keeps it");
  field("aux_loss_alpha", c.aux_loss_alpha, at_least(0.0),
        "weight of the sequence-wise balance loss");
  field("num_attention_heads", c.num_attention_heads, in_range(1, 65536), "query heads");
  field("num_key_value_heads", c.num_key_value_heads, in_range(0, 65536).or_null(),
        "key/value heads; 0 means num_attention_heads");
  field("head_dim", c.head_dim, in_range(0, 65536).or_null(),
        "GQA head width; 0 means hidden_size / num_attention_heads");
  field("kv_lora_rank", c.kv_lora_rank, in_range(0, 1 << 20).or_null(),
        "width of the compressed keys and values; above 0 is MLA");
  field("q_lora_rank", c.q_lora_rank, in_range(0, 1 << 20).or_null(),
        "width of compressed queries; 0 or null is none");
  field("qk_nope_head_dim", c.qk_nope_head_dim, in_range(0, 65536).or_null(),
        "MLA: part of a query head without position");
  field("qk_rope_head_dim", c.qk_rope_head_dim, in_range(0, 65536).or_null(),
        "MLA: rotated part of a query head");
  field("v_head_dim", c.v_head_dim, in_range(0, 65536).or_null(), "MLA: width of a value head");
  field("attention_bias", c.attention_bias, any(), "biases in the attention projections");
  field("attention_output_bias", c.attention_output_bias, any(),
        "GQA: a bias in the output projection; false with attention_bias is Qwen2's choice");
  field("rope_theta", c.rope_theta, above(0.0), "base of the rotary frequencies");
  field("rope_interleave", c.rope_interleave, any(),
        "pairs are neighbours (true) or half a head apart (false)");
  field("rope_scaling", c.rope_scaling, any().or_null(), "context extension");
  field("max_position_embeddings", c.max_position_embeddings, in_range(1, 1 << 30),
        "longest sequence");
  field("rms_norm_eps", c.rms_norm_eps, above(0.0), "added to the mean square");
  field("tie_word_embeddings", c.tie_word_embeddings, any(), "the output head is the embedding");
  field("initializer_range", c.initializer_range, above(0.0),
        "standard deviation of initial weights");
  field("num_nextn_predict_layers", c.num_nextn_predict_layers, in_range(0, 64),
        "multi-token prediction modules");
  field("mtp_loss_weight", c.mtp_loss_weight, at_least(0.0),
        "weight of the multi-token prediction loss");
}

}  // namespace dstrain
