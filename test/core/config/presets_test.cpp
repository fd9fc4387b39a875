// Presets, and suggestions for mistyped words.
#include "core/config/presets.h"

#include "core/config/suggest.h"
#include "test/support/catch.h"

using namespace dstrain;

namespace {

// Parameters of a model without multi-token prediction, counted from its shapes.
int64_t parameter_count(const ModelConfig& m) {
  const int64_t h = m.hidden_size, heads = m.num_attention_heads;
  int64_t attention = 0;
  if (m.is_mla()) {
    attention += m.q_lora_rank > 0
                     ? h * m.q_lora_rank + m.q_lora_rank + m.q_lora_rank * heads * m.qk_dim()
                     : h * heads * m.qk_dim();
    attention += h * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank;
    attention +=
        m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim) + heads * m.v_head_dim * h;
  } else {
    attention += 2 * h * heads * m.gqa_head_dim() + 2 * h * m.kv_heads() * m.gqa_head_dim();
  }
  int64_t total = m.vocab_size * h * (m.tie_word_embeddings ? 1 : 2) + h;
  for (int64_t layer = 0; layer < m.num_hidden_layers; ++layer) {
    total += attention + 2 * h;
    if (m.is_moe_layer(layer))
      total += m.n_routed_experts * h +
               3 * h * m.moe_intermediate_size * (m.n_routed_experts + m.n_shared_experts);
    else
      total += 3 * h * m.intermediate_size;
  }
  return total;
}

}  // namespace

TEST_CASE("presets: sizes are those of the models they name", "[config]") {
  // As transformers 5.23 counts the models that it builds from these presets' config.json.
  CHECK(parameter_count(*find_preset("v2-lite")) == 15706484224);
  CHECK(parameter_count(*find_preset("v2-lite-6l")) == 3424678912);
  CHECK(parameter_count(*find_preset("deepseek-v3")) == 671026404352);
  CHECK(parameter_count(*find_preset("deepseek-72b")) == 71652675584);
  CHECK(parameter_count(*find_preset("dense-1b")) == 1498482688);
  CHECK(parameter_count(*find_preset("qwen-1.5b")) == 1543656960);
  CHECK(parameter_count(*find_preset("quickstart-moe")) == 14864000);
}

TEST_CASE("presets: every one has its name and a line about it", "[config]") {
  for (const Preset& preset : presets()) {
    CHECK(preset.model.preset == preset.name);
    CHECK(preset.description.size() > 10);
    CHECK(preset.description.find('\n') == std::string::npos);
  }
  CHECK(find_preset("deepseek-72b").has_value());
  CHECK_FALSE(find_preset("v2").has_value());
  CHECK_FALSE(find_preset("").has_value());
  CHECK(suggest_preset("deepseek-72") == "did you mean 'deepseek-72b'?");
  CHECK(suggest_preset("gpt-5").find("presets are quickstart-moe") == 0);
}

TEST_CASE("suggest: edit distance", "[config]") {
  CHECK(edit_distance("", "") == 0);
  CHECK(edit_distance("abc", "") == 3);
  CHECK(edit_distance("", "abc") == 3);
  CHECK(edit_distance("kitten", "sitting") == 3);
  CHECK(edit_distance("steps", "setps") == 1);  // neighbours swapped
  CHECK(edit_distance("ca", "abc") == 3);       // no edit inside a swapped pair
  CHECK(edit_distance("abcdef", "abcdef") == 0);
}

TEST_CASE("suggest: only near words, the nearest first", "[config]") {
  const std::vector<std::string> words = {"steps", "seed", "weight_decay", "lr"};
  CHECK(closest_word("stpes", words) == std::optional<std::string>("steps"));
  CHECK(closest_word("weightdecay", words) == std::optional<std::string>("weight_decay"));
  CHECK(closest_word("l", words) == std::optional<std::string>("lr"));
  CHECK_FALSE(closest_word("banana", words).has_value());
  CHECK_FALSE(closest_word("", words).has_value());
  CHECK_FALSE(closest_word(std::string(100000, 's'), words).has_value());
}
