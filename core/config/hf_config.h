// Hugging Face config.json to ModelConfig and back, for the families deepseek_v3, deepseek_v2, llama
// and qwen2. Files are read in the published form (rope_theta, rope_scaling) and in that of
// transformers 5 (rope_parameters). A feature that we do not compute is refused by name.
// What is not part of a config.json (bias_update_speed, mtp_loss_weight) keeps its default.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "core/config/config.h"

namespace dstrain {

constexpr int64_t kMaxHfConfigBytes = 1024 * 1024;

// Throws DataError naming `path` and the key, or line and column where the JSON is broken. num_nextn_predict_layers is read as 0 unless
// `with_mtp` is set: files name multi-token prediction modules whose weights are often left out.
ModelConfig parse_hf_config(std::string_view text, const std::string& path, bool with_mtp = false);

struct HfConfigExtras {
  std::string torch_dtype;  // of the weights beside the file; empty: what the original says
  std::optional<int64_t> bos_token_id;
  std::optional<int64_t> eos_token_id;
  std::string original;       // text of the config.json that the weights came with; empty: none
  std::string original_name;  // starts error texts about it
};

// The published form, which transformers 4 and 5 load. model.vocab_size must be set. Throws
// ConfigError if no family computes this model.
// Of an original of the same family every key stays that the model did not change, in the form that it has
// there, also keys that mean nothing here; an unchanged model gives back its text.
std::string hf_config_text(const ModelConfig& model, const HfConfigExtras& extras);

}  // namespace dstrain
