// Rules across keys, warnings, and what a build lacks.
#include "core/config/validate.h"

#include <fmt/format.h>

#include "core/backend/compressed_format.h"
#include "core/config/availability.h"
#include "core/config/presets.h"
#include "test/support/catch.h"

using namespace dstrain;

namespace {

// A job that breaks no rule, changed by "key=value" pairs.
LoadedConfig job(const std::vector<std::pair<std::string, std::string>>& changes = {}) {
  std::vector<Override> overrides = {{"model.preset", "quickstart-moe", "preset"},
                                     {"run.name", "test", "name"},
                                     {"data.train", "[{path: a}]", "train"}};
  for (const auto& [key, value] : changes)
    overrides.push_back({key, value, "--set " + key + "=" + value});
  return load_config(std::nullopt, overrides);
}

std::string problems_of(const std::vector<std::pair<std::string, std::string>>& changes,
                        Purpose purpose = Purpose::train) {
  try {
    validate(job(changes), purpose);
  } catch (const ConfigProblems& e) {
    return e.what();
  }
  return "(valid)";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("validate: a density is held against the block that compression has", "[config]") {
  const auto refused = [](double elements) {
    const double density = elements / static_cast<double>(TopkFormat().block);
    return problems_of({{"compression.method", "topk"},
                        {"compression.density", fmt::format("{:.9f}", density)}}) != "(valid)";
  };
  CHECK(refused(0.98));
  CHECK_FALSE(refused(1.02));
}

TEST_CASE("validate: presets and the quick start break no rule", "[config]") {
  CHECK(problems_of({}) == "(valid)");
  for (const Preset& preset : presets()) {
    CAPTURE(preset.name);
    CHECK(problems_of({{"model.preset", preset.name}}) == "(valid)");
    CHECK(config_warnings(job({{"model.preset", preset.name}}).config).empty());
  }
  const LoadedConfig quickstart =
      load_config(std::string(DSTRAIN_SOURCE_DIR) + "/configs/quickstart.yaml");
  validate(quickstart, Purpose::train);
  CHECK(unavailable_features(quickstart.config, {}).empty());
}

TEST_CASE("validate: each broken rule names keys, values and a fix", "[config]") {
  struct Case {
    std::vector<std::pair<std::string, std::string>> changes;
    std::string message;
    std::string hint;
  };
  const std::vector<Case> cases = {
      {{{"train.micro_batch", "7"}},
       "train.global_batch (16) is not a multiple of train.micro_batch (7)",
       "try micro_batch 4 or 8"},
      {{{"train.micro_batch", "32"}},
       "is not a multiple of train.micro_batch (32)",
       "try micro_batch 16"},
      {{{"parallel.data", "3"}},
       "train.global_batch (16) does not divide over 3 data-parallel ranks",
       "try 15 or 18"},
      {{{"run.name", "../x"}}, "run.name '../x' cannot be a folder's name", "use letters"},
      {{{"run.name", "-x"}}, "run.name '-x'", ""},
      {{{"run.name", ".."}}, "run.name '..'", ""},
      {{{"run.name", "a/b"}}, "run.name 'a/b'", ""},
      {{{"run.name", "$(touch x)"}}, "cannot be a folder's name", ""},
      {{{"run.name", ""}, {"model.preset", ""}}, "run.name is missing", "add  run: {name: my-run}"},
      {{{"run.dir", ""}}, "run.dir is empty", "write '.'"},
      {{{"data.train", "[]"}}, "data.train is missing", "add  data: {train"},
      {{{"data.valid[0].weight", "2"}}, "data.valid[0] has no path", "name a dataset"},
      {{{"data.train[0].path", ""}}, "data.train[0] has no path", ""},
      {{{"model.vocab_size", "0"}},
       "the vocabulary is unknown",
       "set data.tokenizer or model.vocab_size"},
      {{{"train.eval_every", "5"}},
       "train.eval_every is 5, but data.valid is empty",
       "add data.valid"},
      {{{"model.qk_rope_head_dim", "15"}}, "model.qk_rope_head_dim must be even", "write 16"},
      {{{"model.qk_rope_head_dim", "0"}}, "model.qk_rope_head_dim must be even", "write 2"},
      {{{"model.v_head_dim", "0"}}, "model.v_head_dim must be at least 1", ""},
      {{{"model.num_key_value_heads", "2"}}, "MLA has one per attention head (4)", "leave it out"},
      {{{"model.head_dim", "64"}}, "model.head_dim is for grouped-query attention", ""},
      {{{"model.kv_lora_rank", "0"}},
       "without model.kv_lora_rank attention is not MLA",
       "set model.kv_lora_rank"},
      {{{"model.num_experts_per_tok", "17"}},
       "model.num_experts_per_tok must be 1 to model.n_routed_experts (16), got 17",
       "write 1 to 16"},
      {{{"model.num_experts_per_tok", "0"}}, "model.num_experts_per_tok must be 1 to", ""},
      {{{"model.n_group", "3"}},
       "model.n_routed_experts (16) does not divide into model.n_group (3) groups",
       "try 2 or 4"},
      {{{"model.n_group", "4"}, {"model.topk_group", "5"}},
       "model.topk_group (5) is more than model.n_group (4)",
       "write at most 4"},
      {{{"model.n_group", "8"}, {"model.topk_group", "1"}},
       "hold fewer than model.num_experts_per_tok (4)",
       "write at least 2"},
      {{{"model.n_group", "16"}, {"model.topk_group", "8"}},
       "noaux_tc ranks a group by its best two experts",
       "write at most 8"},
      {{{"model.n_group", "4"}, {"model.topk_method", "greedy"}},
       "greedy does not limit groups",
       ""},
      {{{"model.rope_scaling.factor", "4"}},
       "type default does not scale",
       "write type: linear, yarn or llama3"},
      {{{"model.rope_scaling.type", "llama3"}, {"model.rope_scaling.low_freq_factor", "4"}},
       "high_freq_factor (4) must be above low_freq_factor (4)",
       "4 and 1 are usual"},
      {{{"model.rope_scaling.type", "yarn"}, {"model.rope_scaling.beta_fast", "1"}},
       "beta_fast (1) must be above beta_slow (1)",
       ""},
      {{{"model.hidden_size", "1048576"},
        {"model.moe_intermediate_size", "4194304"},
        {"model.n_routed_experts", "65536"}},
       "parameters; the limit is 1e15",
       ""},
      {{{"data.seq_len", "5000"}},
       "data.seq_len (5000) is more than model.max_position_embeddings (4096)",
       "write at most 4096"},
      {{{"train.global_batch", "8388608"}, {"train.micro_batch", "8388608"}},
       "is more than 2^30 tokens at once",
       "write at most 4194304"},
      {{{"optimizer.betas", "[0.9, 1.0]"}}, "optimizer.betas must be below 1", ""},
      {{{"schedule.name", "wsd"}, {"schedule.warmup", "90%"}},
       "together are longer than train.steps (1000)",
       "write at most 100"},
      {{{"run.device", "cpu"}, {"precision.compute", "bf16"}},
       "precision.compute bf16 needs a GPU",
       "write fp32 or auto"},
      {{{"run.device", "cpu"}, {"precision.compute", "tf32"}},
       "precision.compute tf32 needs a GPU",
       ""},
      {{{"optimizer.eps", "1e-300"}},
       "optimizer.eps (1e-300) is zero in fp32, which holds 1.2e-38 and above",
       "1e-8 is usual"},
      {{{"model.rms_norm_eps", "1e-39"}},
       "model.rms_norm_eps (1e-39) is zero in fp32",
       "1e-6 is usual"},
      {{{"train.global_batch", "1073741824"}},
       "train.global_batch (1073741824) makes 134217728 micro-batches of 8 on each data-parallel "
       "rank; the limit is 1048576",
       "raise train.micro_batch"},
      {{{"compression.method", "topk"}, {"compression.density", "1e-5"}},
       "compression.density (1e-05) of a block of 8192 elements is less than one element",
       "0.05 sends"},
      {{{"compression.method", "topk"}, {"compression.density", "0"}},
       "compression.density must be above 0",
       ""},
      {{{"compression.method", "topk"},
        {"compression.density", "0.01"},
        {"compression.block", "64"}},
       "compression.density (0.01) of a block of 64 elements is less than one element",
       "write auto"},
      {{{"compression.method", "auto"}, {"run.deterministic", "true"}},
       "compression.method auto chooses by measured times",
       "name none, int8 or topk"},
      {{{"compression.method", "auto"}, {"compression.block", "256"}},
       "compression.block (256) is a number for one method",
       "write auto"},
      {{{"precision.reduce", "bf16"}, {"compression.method", "int8"}},
       "precision.reduce bf16 and compression.method int8 both say what is sent of gradients",
       "write fp32, or compression.method: none"},
      {{{"precision.reduce", "bf16"}, {"compression.method", "auto"}},
       "and auto compares with sums in fp32 alone",
       "write fp32, or compression.method: none"},
      {{{"parallel.tensor", "3"}}, "parallel.tensor (3) does not divide the 4 heads", "try 2 or 4"},
      {{{"parallel.pipeline", "7"}},
       "parallel.pipeline (7) is more than model.num_hidden_layers (6)",
       ""},
      {{{"parallel.expert", "3"}},
       "model.n_routed_experts (16) does not divide over parallel.expert (3)",
       "try 2 or 4"},
      {{{"parallel.context", "3"}},
       "data.seq_len (256) does not divide into 2 pieces for each of parallel.context (3) ranks",
       "try 2 or 4"},
      {{{"launch.ranks", "3"}, {"parallel.tensor", "2"}},
       "the layout data auto x tensor 2 needs a multiple of 2 ranks, but the job has 3",
       "legal near it: pipeline 3"},
      {{{"launch.ranks", "4"}, {"parallel.data", "2"}, {"train.micro_batch", "4"}},
       "the layout data 2 does not use 4 ranks",
       "legal near it: data 4; "},
      {{{"launch.hosts", "[ok, -oProxyCommand=x]"}},
       "launch.hosts: '-oProxyCommand=x' is no host name",
       ""},
      {{{"launch.hosts", "[\"a;b\"]"}}, "'a;b' is no host name", ""},
  };
  for (const Case& c : cases) {
    const std::string report = problems_of(c.changes);
    CAPTURE(c.message, c.hint, report);
    CHECK(contains(report, "error: "));
    CHECK(contains(report, c.message));
    if (!c.hint.empty()) CHECK(contains(report, "hint: " + c.hint));
  }
}

TEST_CASE("validate: grouped-query attention", "[config]") {
  const auto dense = [](std::vector<std::pair<std::string, std::string>> changes) {
    changes.insert(changes.begin(), {"model.preset", "dense-1b"});
    return problems_of(changes);
  };
  CHECK(contains(dense({{"model.num_key_value_heads", "5"}}),
                 "model.num_attention_heads (32) is not a multiple of model.num_key_value_heads "
                 "(5)\nhint: try 4 or 8"));
  CHECK(contains(dense({{"model.head_dim", "33"}}),
                 "must be even, since RoPE turns pairs; it is 33\nhint: write 34"));
  CHECK(contains(dense({{"model.head_dim", "0"}, {"model.num_attention_heads", "24"}}),
                 "model.hidden_size (2048) does not divide over model.num_attention_heads (24)"));
  CHECK(dense({{"model.head_dim", "0"}}) == "(valid)");
  CHECK(dense({{"model.num_key_value_heads", "0"}}) == "(valid)");
}

TEST_CASE("validate: all broken rules are reported together, where their keys were set",
          "[config]") {
  const std::string report =
      problems_of({{"train.micro_batch", "7"}, {"model.v_head_dim", "0"}, {"run.name", "a/b"}});
  CHECK(contains(report, "--set train.micro_batch=7: error: "));
  CHECK(contains(report, "--set model.v_head_dim=0: error: "));
  CHECK(contains(report, "--set run.name=a/b: error: "));
}

TEST_CASE("validate: looking at a job needs no data and no name", "[config]") {
  CHECK(problems_of({{"run.name", ""}, {"data.train", "[]"}, {"model.vocab_size", "0"}},
                    Purpose::inspect) == "(valid)");
  CHECK(
      contains(problems_of({{"run.name", "a/b"}}, Purpose::inspect), "cannot be a folder's name"));
}

TEST_CASE("validate: a bare model", "[config]") {
  ModelConfig model = *find_preset("v2-lite");
  validate_model(model, "config.json");
  model.qk_rope_head_dim = 7;
  try {
    validate_model(model, "config.json");
    FAIL("accepted an odd RoPE width");
  } catch (const ConfigProblems& e) {
    CHECK(contains(e.what(), "config.json: error: model.qk_rope_head_dim must be even"));
  }
}

TEST_CASE("validate: warnings are no errors", "[config]") {
  const std::vector<std::string> warnings =
      config_warnings(job({{"schedule.warmup", "2000"}}).config);
  REQUIRE(warnings.size() == 1);
  CHECK(contains(warnings[0], "schedule.warmup (2,000 steps) is longer than train.steps (1000)"));
  CHECK(contains(warnings[0], "a learning rate of 5.0e-04 instead of optimizer.lr (1.0e-03)"));
  CHECK(problems_of({{"schedule.warmup", "2000"}}) == "(valid)");
  const auto whole = config_warnings(job({{"schedule.warmup", "100%"}}).config);
  REQUIRE(whole.size() == 1);
  CHECK(contains(whole[0], "schedule.name cosine has no step left to lower the learning rate"));
  const auto none = [](const std::string& key, const std::string& value) {
    return config_warnings(job({{"schedule.warmup", "1000"}, {key, value}}).config).empty();
  };
  CHECK(none("train.steps", "1001"));
  CHECK(none("schedule.name", "constant"));
  CHECK(none("train.steps", "0"));
  CHECK(config_warnings(job({{"model.first_k_dense_replace", "6"}}).config).size() == 1);

  const auto lossy = config_warnings(
      job({{"compression.method", "topk"}, {"compression.error_feedback", "false"}}).config);
  REQUIRE(lossy.size() == 1);
  CHECK(contains(lossy[0], "the 95% of each gradient's elements that are not sent are lost"));
  const auto with_auto = [](const std::string& density) {
    return config_warnings(job({{"compression.method", "auto"},
                                {"compression.density", density},
                                {"compression.error_feedback", "false"}})
                               .config);
  };
  REQUIRE(with_auto("0.1").size() == 1);
  CHECK(contains(with_auto("0.1")[0], "where auto takes topk, the 90% of each"));
  CHECK(with_auto("0").empty());
  CHECK(problems_of({{"compression.method", "auto"}, {"compression.density", "0"}}) == "(valid)");
  CHECK(problems_of({{"precision.reduce", "bf16"}, {"run.device", "cpu"}}) == "(valid)");
}

TEST_CASE("validate: data-parallel ranks", "[config]") {
  const auto ranks = [](const std::vector<std::pair<std::string, std::string>>& changes) {
    return data_parallel_ranks(job(changes).config);
  };
  CHECK(ranks({}) == 1);
  CHECK(ranks({{"parallel.data", "4"}}) == 4);
  CHECK(ranks({{"launch.ranks", "8"}, {"parallel.tensor", "2"}}) == 4);
  CHECK(ranks({{"launch.ranks", "8"}, {"launch.hosts", "[a, b]"}, {"parallel.pipeline", "4"}}) ==
        4);
  CHECK(ranks({{"parallel.expert", "8"}, {"parallel.tensor", "2"}}) == 4);
}

TEST_CASE("availability: everything that this build lacks is named", "[config]") {
  const Config config = job({{"run.device", "cuda"},
                             {"precision.compute", "bf16"},
                             {"precision.moments", "bf16"},
                             {"precision.quantization", "aware"},
                             {"parallel.data", "2"},
                             {"parallel.tensor", "2"},
                             {"compression.method", "topk"},
                             {"launch.ranks", "4"},
                             {"launch.hosts", "[a]"},
                             {"launch.max_restarts", "5"}})
                            .config;
  std::vector<std::string> keys;
  for (const Unavailable& feature : unavailable_features(config, {})) {
    keys.push_back(feature.key);
    CHECK(feature.is_device == (keys.size() <= 3));
  }
  CHECK(keys == std::vector<std::string>{"run.device", "precision.compute", "precision.moments",
                                         "precision.quantization", "parallel.data",
                                         "parallel.tensor", "compression.method", "launch.ranks",
                                         "launch.hosts", "launch.max_restarts"});
  BuildCapabilities all;
  all.cuda = all.cuda_ranks = all.quantization_aware = all.bf16_moments = all.ranks =
      all.compression = all.restarts = true;
  CHECK(unavailable_features(config, all).empty());
  all.cuda_ranks = false;
  const std::vector<Unavailable> ranks_on_gpus = unavailable_features(config, all);
  REQUIRE(ranks_on_gpus.size() == 1);
  CHECK(ranks_on_gpus[0].key == "run.device");
  CHECK(ranks_on_gpus[0].is_device);
  CHECK(contains(ranks_on_gpus[0].sentence, "job of 4 ranks, and ranks on GPUs"));
  CHECK(unavailable_features(job({{"run.device", "cuda"}}).config, all).empty());
  CHECK(unavailable_features(job({{"compression.method", "auto"}}).config, all).empty());
  require_available({});
  try {
    require_available(unavailable_features(config, {}));
    FAIL("accepted what is not available");
  } catch (const ConfigError& e) {
    CHECK(e.code() == ExitCode::bad_config);
    CHECK(contains(e.what(), "precision.quantization: aware is not available"));
    CHECK(contains(e.what(), "launch.hosts: [a] is not available"));
    CHECK(contains(e.what(), "launch.max_restarts: 5 is not available"));
  }
}
