// Hugging Face config.json to ModelConfig and back, for the families deepseek_v3, deepseek_v2 and
// llama. Files are read in the published form (rope_theta, rope_scaling) and in that of
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

// Throws DataError naming `path` and the key. num_nextn_predict_layers is read as 0 unless
// `with_mtp` is set: files name multi-token prediction modules whose weights are often left out.
ModelConfig parse_hf_config(std::string_view text, const std::string& path, bool with_mtp = false);

struct HfConfigExtras {
  std::string torch_dtype = "bfloat16";  // of the weights beside the file
  std::optional<int64_t> bos_token_id;
  std::optional<int64_t> eos_token_id;
};

// The published form, which transformers 4 and 5 load. model.vocab_size must be set. Throws
// ConfigError if no family computes this model.
std::string hf_config_text(const ModelConfig& model, const HfConfigExtras& extras);

}  // namespace dstrain
