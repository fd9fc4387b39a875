// The commands in the order in which one uses them, and what they promise about their streams.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;
using nlohmann::json;
namespace fs = std::filesystem;

Finished expect_ok(const std::vector<std::string>& args, const std::string& folder) {
  const Finished finished = run_program(args, folder);
  INFO(fmt::format("{}", fmt::join(args, " ")) << "\n" << finished.text());
  REQUIRE(finished.code == 0);
  return finished;
}

// Anonymous memory that the process holds, in bytes; 0 once it has ended.
int64_t anonymous_bytes(pid_t pid) {
  const std::string status = read_file(fmt::format("/proc/{}/status", pid));
  const size_t at = status.find("RssAnon:");
  return at == std::string::npos ? 0 : std::stoll(status.substr(at + 8)) * 1024;
}

}  // namespace

TEST_CASE("flow: from text to a model in Hugging Face's form and back", "[flow]") {
  const TempFolder folder;
  const std::string& here = folder.path();
  write_file(folder / "train.txt", synthetic_text(/*seed=*/1, /*lines=*/300));
  write_file(folder / "valid.txt", synthetic_text(/*seed=*/2, /*lines=*/40));
  fs::create_directory(folder / "tok");
  expect_ok(
      {"tokenizer", "train", "train.txt", "--vocab-size", "320", "--output", "tok/tokenizer.json"},
      here);
  const std::string ids =
      expect_ok({"tokenizer", "encode", "--tokenizer", "tok/tokenizer.json", "the river moves"},
                here)
          .out;
  CHECK(expect_ok({"tokenizer", "decode", "--tokenizer", "tok/tokenizer.json", ids}, here).out ==
        "the river moves\n");
  for (const std::string name : {"train", "valid"})
    expect_ok({"data", "build", name + ".txt", "--split", "line", "--tokenizer",
               "tok/tokenizer.json", "--output", name},
              here);
  CHECK_THAT(expect_ok({"data", "inspect", "valid", "--limit", "1"}, here).out,
             Contains("documents"));

  write_file(folder / "job.yaml", R"(run: {name: flow, threads: 1}
model: {hidden_size: 32, num_hidden_layers: 2, intermediate_size: 64, moe_intermediate_size: 24,
        n_routed_experts: 4, n_shared_experts: 1, num_experts_per_tok: 2, num_attention_heads: 2,
        kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}
data: {tokenizer: tok/tokenizer.json, train: [{path: train}], valid: [{path: valid}], seq_len: 32}
train: {steps: 30, global_batch: 4, micro_batch: 2}
optimizer: {lr: 5.0e-3}
)");
  expect_ok({"--config", "job.yaml"}, here);

  // The evaluation of the last step, asked for again.
  const json eval = json::parse(expect_ok({"eval", "--run", "runs/flow", "--json"}, here).out);
  std::string last_eval;
  for (const std::string& line : lines_of(read_file(folder / "runs/flow/metrics.jsonl")))
    if (json_field(line, "event") == "eval") last_eval = line;
  CHECK(eval["loss"].dump() == json_field(last_eval, "loss"));
  CHECK(eval["bits_per_byte"].dump() == json_field(last_eval, "bits_per_byte"));
  CHECK(eval["loss"].get<double>() < 5.7);  // ln 320 = 5.77: it learned

  const std::vector<std::string> prompt = {"--prompt", "the river",    "--temperature",
                                           "0",        "--max-tokens", "12"};
  const std::string text = expect_ok(joined({"generate", "--run", "runs/flow"}, prompt), here).out;
  CHECK_THAT(text, Catch::StartsWith("the river"));
  CHECK(text.size() > std::string("the river\n").size());
  CHECK(expect_ok(joined({"generate", "--run", "runs/flow"}, prompt), here).out == text);

  for (const std::string dtype : {"fp32", "bf16"}) {
    CAPTURE(dtype);
    const std::string a = "hf_" + dtype, b = "again_" + dtype, run = "runs/imported_" + dtype;
    expect_ok({"export", "runs/flow", "--output", a, "--dtype", dtype}, here);
    expect_ok({"import", a, "--output", run}, here);
    expect_ok({"export", run, "--output", b}, here);
    for (const char* file : {"/model.safetensors", "/config.json", "/tokenizer.json"}) {
      CAPTURE(file);
      CHECK_FALSE(read_file(here + "/" + a + file).empty());
      CHECK(read_file(here + "/" + a + file) == read_file(here + "/" + b + file));
    }
    if (dtype == "bf16") continue;
    CHECK(expect_ok(joined({"generate", "--model", a}, prompt), here).out == text);
    CHECK(expect_ok(joined({"generate", "--run", run}, prompt), here).out == text);
  }
  // Training goes on from the weights, with the values of its config.json.
  expect_ok({"--config", "job.yaml", "--set", "run.name=tuned", "--set", "model.from=hf_fp32"},
            here);
}

TEST_CASE("flow: a run proposes export where Hugging Face has the model, and text with a tokenizer",
          "[flow]") {
  const auto proposed = [](const std::vector<std::string>& settings) {
    const TinyJob job(joined({"train.steps=1"}, settings));
    job.must_train();
    const json end = json::parse(events(job, "end").at(0));
    std::vector<std::string> commands;
    for (const json& command : end["next"])
      commands.push_back(command.get<std::string>().substr(0, 23));
    return commands;
  };
  const std::string generate = "deepseek-train generate", export_model = "deepseek-train export r";
  CHECK(proposed(latent_attention()) == std::vector<std::string>{generate, export_model});
  CHECK(proposed({}) == std::vector<std::string>{generate});  // grouped-query attention, experts
  CHECK(proposed({"model.n_routed_experts=0", "model.n_shared_experts=0",
                  "model.num_experts_per_tok=0"}) ==
        std::vector<std::string>{generate, export_model});
  CHECK(proposed(joined(latent_attention(), {"data.tokenizer=", "model.vocab_size=320"})) ==
        std::vector<std::string>{export_model});
}

TEST_CASE("flow: checkpoints are listed and verified", "[flow]") {
  const TinyJob job;
  job.must_train();
  const std::vector<std::string> rows =
      lines_of(expect_ok({"ckpt", "ls", job.run_folder()}, "").out);
  REQUIRE(rows.size() == 3);
  CHECK_THAT(rows[1], Contains("20") && Contains("complete"));
  for (const std::string& line :
       lines_of(expect_ok({"ckpt", "ls", job.run_folder(), "--json"}, "").out))
    CHECK(json::parse(line)["ok"] == true);
  CHECK_THAT(expect_ok({"ckpt", "verify", job.checkpoint(10)}, "").out,
             Contains("step-00000010: ok"));
}

TEST_CASE("flow: the job file is explained, shown and described", "[flow]") {
  const TinyJob job;
  CHECK_THAT(expect_ok({"config", "explain", "optimizer.lr"}, "").out, Contains("at least 0"));
  const json schema = json::parse(expect_ok({"config", "schema"}, "").out);
  CHECK(schema["properties"].contains("model"));
  const std::string shown = expect_ok({"config", "show", "--config", "job.yaml"}, job.folder()).out;
  write_file(job.folder() + "/shown.yaml", shown);
  CHECK(expect_ok({"config", "show", "--config", "shown.yaml"}, job.folder()).out == shown);
  CHECK_THAT(expect_ok({"config", "show", "--config", "job.yaml", "--lr", "0.5", "--origins"},
                       job.folder())
                 .out,
             Contains("--lr"));
  // The stamp of a run is a job file that runs the same again.
  job.must_train();
  const RunTrace first = trace_of(job);
  fs::copy(job.run_folder() + "/job.yaml", job.folder() + "/stamp.yaml");
  expect_ok({"--config", "stamp.yaml", "--overwrite"}, job.folder());
  CHECK(difference(first, trace_of(job)) == "");
}

TEST_CASE("flow: version --json has what scripts ask for", "[flow]") {
  const json version = json::parse(expect_ok({"version", "--json"}, "").out);
  for (const char* key :
       {"version", "commit", "cuda_version", "recommended_gpu", "new_features", "libraries"})
    CHECK(version.contains(key));
  CHECK(version["version"].is_string());
  CHECK(version["new_features"].is_array());
  CHECK(version["libraries"].is_object());
  CHECK_THAT(expect_ok({"--version"}, "").out, Contains(version["version"].get<std::string>()));
}

TEST_CASE("flow: help comes at once", "[flow]") {
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    const Finished help = expect_ok({"--help"}, "");
    CHECK_THAT(help.out, Contains("Exit codes") && Contains("--resume"));
    best = std::min(best, help.seconds);
  }
  std::cout << fmt::format("--help takes {:.1f} ms", 1e3 * best) << std::endl;
  CHECK(best < 0.150);
}

TEST_CASE("flow: standard output is for results, --quiet and --log-json say the same as the log",
          "[flow]") {
  const TinyJob job({"train.steps=6", "train.eval_every=3"});
  const Finished loud = job.train({"--overwrite"});
  CHECK(loud.code == 0);
  CHECK(loud.out.empty());
  CHECK_THAT(loud.err, Contains("step 6/6") && Contains("finished at step 6 of 6"));

  const Finished quiet = job.train({"--overwrite", "--quiet"});
  CHECK(quiet.code == 0);
  CHECK(quiet.out.empty());
  CHECK(lines_of(quiet.err).size() <= 1);

  const Finished logged = job.train({"--overwrite", "--log-json"});
  CHECK(logged.code == 0);
  CHECK(logged.out.empty());
  std::map<std::string, int> seen;
  for (const std::string& line : lines_of(logged.err)) {
    CAPTURE(line);
    const json object = json::parse(line, nullptr, false);
    REQUIRE(object.is_object());
    CHECK(object.contains("ts"));
    CHECK(object.contains("level"));
    ++seen[object.value("event", "log")];
  }
  CHECK(seen["start"] == 1);
  CHECK(seen["step"] == 6);
  CHECK(seen["eval"] == 2);
  CHECK(seen["checkpoint"] == 1);
  CHECK(seen["end"] == 1);
  // metrics.jsonl has the same events.
  for (const char* event : {"start", "step", "eval", "checkpoint", "end"})
    CHECK(std::ssize(events(job, event)) == seen[event]);
}

TEST_CASE("flow: with --log-json warnings and resumes are JSON too", "[flow]") {
  const TinyJob job({"train.steps=4"});
  job.must_train();
  for (const std::vector<std::string>& more :
       {std::vector<std::string>{"--set", "train.steps=6"}, {}}) {
    const Finished again = job.train(joined({"--resume", "latest", "--log-json"}, more));
    CHECK(again.code == 0);
    for (const std::string& line : lines_of(again.err)) {
      CAPTURE(line);
      CHECK(json::parse(line, nullptr, false).is_object());
    }
  }
}

#ifdef DSTRAIN_FAILPOINTS

TEST_CASE("flow: each save says how long training waited for it", "[flow]") {
  const TinyJob job({"train.steps=8", "train.eval_every=0", "checkpoint.every=4"});
  Launch launch = job.launch();
  launch.failpoint = "save.before_manifest@1=sleep:800";  // of step 4; step 8 waits for it
  RunningProgram program(launch);
  const Finished end = program.wait();
  INFO(end.err);
  REQUIRE(end.code == 0);
  const std::vector<std::string> saves = events(job, "checkpoint");
  REQUIRE(saves.size() == 2);
  CAPTURE(saves[0], saves[1]);
  CHECK(json::parse(saves[0])["stall_ms"].get<double>() < 300);
  CHECK(json::parse(saves[1])["stall_ms"].get<double>() > 300);
}

TEST_CASE("memory: a run takes what its plan says, to a tenth", "[flow][memory]") {
  const json version = json::parse(expect_ok({"version", "--json"}, "").out);
  if (!version["sanitizers"].is_null()) return print_skipped("sanitizers take memory of their own");
  const TinyJob job({"model.hidden_size=128", "model.num_hidden_layers=4",
                     "model.intermediate_size=512", "model.moe_intermediate_size=256",
                     "model.n_routed_experts=12", "model.num_attention_heads=4", "data.seq_len=128",
                     "train.global_batch=4", "train.steps=3", "train.eval_every=0",
                     "train.eval_batches=1", "checkpoint.every=0"});
  Launch launch = job.launch();
  launch.failpoint = "save.after_shard_close=sleep:500";  // the last save, after all steps
  RunningProgram program(launch);
  int64_t taken = 0;
  program.wait_until([&] {
    if (job.num_leftovers() == 1) taken = std::max(taken, anonymous_bytes(program.pid()));
    return !program.is_running();
  });
  const Finished end = program.wait();
  INFO(end.err);
  REQUIRE(end.code == 0);
  const json start = json::parse(events(job, "start").at(0));
  int64_t planned = 0;
  for (const auto& [owner, bytes] : start["memory_bytes"].items()) planned += bytes.get<int64_t>();
  const double ratio = static_cast<double>(taken) / static_cast<double>(planned);
  std::cout << fmt::format("{} parameters: planned {:.1f} MB, taken {:.1f} MB, ratio {:.3f}",
                           start["parameters_total"].dump(), 1e-6 * static_cast<double>(planned),
                           1e-6 * static_cast<double>(taken), ratio)
            << std::endl;
  CHECK(start["parameters_total"].get<int64_t>() > 4'000'000);
  CHECK(ratio > 0.9);
  CHECK(ratio < 1.1);
}

#endif

}  // namespace dstrain::test
