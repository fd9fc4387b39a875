// bench: what it prints. How fast anything is, is not tested here.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "apps/ceilings.h"
#include "apps/comm_bench.h"
#include "apps/step_bench.h"
#include "core/backend/cpu_backend.h"
#include "core/base/error.h"
#include "core/base/format_units.h"
#include "test/support/catch.h"
#include "test/support/run_program.h"

namespace dstrain::test {
namespace {

using nlohmann::json;

std::vector<std::string> bench(const char* what, std::vector<std::string> more) {
  std::vector<std::string> args{"bench", what, "--micro-batch", "2", "--accumulation", "2",
                                "--seq", "16", "--steps",       "2", "--threads",      "1"};
  for (const char* key :
       {"run.device=cpu", "model.vocab_size=64", "model.hidden_size=32",
        "model.num_hidden_layers=2", "model.intermediate_size=64", "model.n_routed_experts=4",
        "model.num_experts_per_tok=2", "model.moe_intermediate_size=16",
        "model.num_attention_heads=2", "model.kv_lora_rank=16", "model.qk_nope_head_dim=16",
        "model.qk_rope_head_dim=8", "model.v_head_dim=16"}) {
    args.push_back("--set");
    args.push_back(key);
  }
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

std::vector<json> objects_of(const std::string& text) {
  std::vector<json> objects;
  for (size_t at = 0, end; (end = text.find('\n', at)) != std::string::npos; at = end + 1)
    objects.push_back(json::parse(text.substr(at, end - at)));
  return objects;
}

}  // namespace

TEST_CASE("bench ops: every operation with its work, time and share, the longest first") {
  const Finished finished = run_program(bench("ops", {"--json"}));
  INFO(finished.err);
  REQUIRE(finished.code == 0);
  const std::vector<json> rows = objects_of(finished.out);
  REQUIRE(rows.size() > 20);
  CHECK(std::is_sorted(rows.begin(), rows.end(), [](const json& a, const json& b) {
    return a["ms"].get<double>() > b["ms"].get<double>();
  }));
  const auto head = std::find_if(rows.begin(), rows.end(), [](const json& row) {
    return row["operation"] == "matmul 32x64x32 nt f32";
  });
  REQUIRE(head != rows.end());
  CHECK((*head)["calls"] == 2);  // one per micro-batch
  const double seconds = 1e-3 * (*head)["ms"].get<double>();
  CHECK(1e12 * (*head)["tflops"].get<double>() * seconds == Approx(2.0 * 2 * 32 * 64 * 32));
  CHECK((*head)["ceiling_tflops"].get<double>() > 0);
  const double least = 2.0 * 2 * 32 * 64 * 32 / (1e12 * (*head)["ceiling_tflops"].get<double>());
  CHECK((*head)["share_of_ceiling"].get<double>() >= Approx(least / seconds));
}

TEST_CASE("bench ops: a filter leaves those whose name contains it") {
  const Finished finished = run_program(bench("ops", {"--filter", "rms_norm"}));
  REQUIRE(finished.code == 0);
  CHECK_THAT(finished.out,
             Catch::Contains("add_rms_norm") && Catch::Contains("rms_norm_backward") &&
                 Catch::Contains("ceilings of this device") && !Catch::Contains("matmul"));
}

TEST_CASE("bench step: one JSON object whose figures agree with each other") {
  const Finished finished = run_program(bench("step", {"--json", "--profile"}));
  REQUIRE(finished.code == 0);
  const std::vector<json> objects = objects_of(finished.out);
  REQUIRE(objects.size() == 1);
  const json& r = objects[0];
  CHECK(r["tokens_per_s_per_gpu"].get<double>() ==
        Approx(1e3 * 4 * 16 / r["step_ms"].get<double>()).epsilon(0.05));  // printed to 0.01 ms
  CHECK(r["step_ms_fastest"].get<double>() <= r["step_ms"].get<double>() + 0.01);
  CHECK(r["accumulation"] == 2);
  CHECK(r["profile"]["adamw"]["calls"].get<int>() > 0);
}

// The keys of DeepSeek-V2-Lite's file, with small sizes; the last is V3's.
TEST_CASE("bench step: a config.json of Hugging Face is a model, under what --set says") {
  const TempFolder folder;
  write_file(folder / "config.json", R"({
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64, "kv_lora_rank": 16,
    "max_position_embeddings": 640, "model_type": "deepseek_v2", "moe_intermediate_size": 16,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 4, "n_shared_experts": 2,
    "norm_topk_prob": false, "num_attention_heads": 2, "num_experts_per_tok": 2,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "pretraining_tp": 1, "q_lora_rank": null,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
      "mscale_all_dim": 0.707, "original_max_position_embeddings": 16, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
    "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
    "v_head_dim": 16, "vocab_size": 96, "quantization_config": {"quant_method": "fp8"}})");
  const auto parameters = [&](const std::vector<std::string>& more) {
    std::vector<std::string> args = {"bench", "step", "--model-config", folder / "config.json"};
    for (const char* word : {"--batch", "2", "--seq", "16", "--steps", "1", "--threads", "1",
                             "--set", "run.device=cpu"})
      args.push_back(word);
    args.insert(args.end(), more.begin(), more.end());
    const Finished finished = run_program(args);
    INFO(finished.err);
    REQUIRE(finished.code == 0);
    return finished.out.substr(0, finished.out.find(" parameters"));
  };
  const int64_t attention = 32 * 2 * 24 + 32 * 24 + 16 + 16 * 2 * 32 + 2 * 16 * 32, norms = 2 * 32;
  const int64_t dense = 3 * 32 * 64, experts = 32 * 4 + (4 + 2) * 3 * 32 * 16;
  const int64_t rest = 2 * 96 * 32 + 32;
  CHECK(parameters({}) == format_count(rest + 3 * (attention + norms) + dense + 2 * experts));
  CHECK(parameters({"--set", "model.num_hidden_layers=2"}) ==
        format_count(rest + 2 * (attention + norms) + dense + experts));
  const Finished twice = run_program({"bench", "step", "--model-config", folder / "config.json",
                                      "--set", "model.preset=v2-lite"});
  CHECK(twice.code == 2);
  CHECK_THAT(twice.err,
             Catch::Contains("--model-config and --set model.preset both name a whole model"));
}

TEST_CASE("bench: packed documents fill their sequences, each from position 0") {
  Config config;
  config.model.vocab_size = 10;
  config.train.micro_batch = 3;
  config.data.seq_len = 20;
  const SyntheticBatch batch(config, 1, 4);
  const std::vector<int32_t>& offsets = batch.offsets;
  REQUIRE(offsets.front() == 0);
  REQUIRE(offsets.back() == 60);
  CHECK(std::is_sorted(offsets.begin(), offsets.end()));
  CHECK(std::adjacent_find(offsets.begin(), offsets.end()) == offsets.end());
  for (const int32_t end : {20, 40}) CHECK(std::count(offsets.begin(), offsets.end(), end) == 1);
  CHECK(offsets.size() > 7);
  CHECK(batch.batch.num_segments == std::ssize(offsets) - 1);
  for (size_t i = 0; i + 1 < offsets.size(); ++i)
    for (int32_t t = offsets[i]; t < offsets[i + 1]; ++t)
      REQUIRE(batch.positions[static_cast<size_t>(t)] == t - offsets[i]);
}

TEST_CASE("bench comm: each call in each size and type, with rates that agree") {
  const Finished finished =
      run_program({"bench", "comm", "--set", "launch.ranks=2", "--set", "run.device=cpu",
                   "--threads", "1", "--sizes", "4K,24KiB", "--json"});
  INFO(finished.err);
  REQUIRE(finished.code == 0);
  const std::vector<json> rows = objects_of(finished.out);
  REQUIRE(rows.size() == 5 * 2 * 2);
  for (const json& row : rows) {
    CAPTURE(row.dump());
    CHECK(row["ranks"] == 2);
    CHECK((row["bytes"] == 4096 || row["bytes"] == 24576));
    const double rate = row["algorithm_gb_per_s"].get<double>();
    CHECK(1e-3 * row["bytes"].get<double>() / row["us"].get<double>() == Approx(rate));
    const bool is_whole = row["call"] == "all_reduce" || row["call"] == "send_recv";
    CHECK(row["bus_gb_per_s"].get<double>() == Approx(is_whole ? rate : rate / 2));
  }
}

TEST_CASE("bench comm: any number of ranks, whatever batch and layout the job has") {
  std::vector<std::string> words = {"bench",   "comm",
                                    "--set",   "launch.ranks=3",
                                    "--set",   "run.device=cpu",
                                    "--set",   "parallel.tensor=2",
                                    "--sizes", "4K"};
  const Finished finished = run_program(words);
  INFO(finished.err);
  CHECK(finished.code == 0);
  CHECK_THAT(finished.out, Catch::Contains("3 ranks, ") && Catch::Contains("all_reduce"));

  words.back() = "4K,8";
  const Finished too_small = run_program(words);
  CHECK(too_small.code == 2);
  CHECK_THAT(too_small.err, Catch::Contains("--sizes: 8 bytes are too few for 3 ranks"));
}

TEST_CASE("bench comm: one rank, and sizes that are none, are refused") {
  const Finished alone = run_program({"bench", "comm", "--set", "run.device=cpu"});
  CHECK(alone.code == 2);
  CHECK_THAT(alone.err, Catch::Contains("two ranks or more"));
  CHECK(parse_sizes("7,4K,1MiB", "--sizes") == std::vector<int64_t>{7, 4096, 1 << 20});
  for (const char* text : {"", "4K,", "0", "-1", "1T", "4 K", "99999999999999999999", "128G"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(parse_sizes(text, "--sizes"), UsageError);
  }
}

TEST_CASE("ceilings: the larger of work and traffic counts") {
  const Ceilings ceilings{.flops = 100, .bytes = 10};
  CHECK(ceilings.least_seconds(1000, 10) == 10);
  CHECK(ceilings.least_seconds(1000, 200) == 20);
}

}  // namespace dstrain::test
