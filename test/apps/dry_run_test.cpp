// --dry-run: the plan of a run, what a run would be refused for as warnings, and nothing written.
#include <algorithm>
#include <filesystem>
#include <regex>

#include "core/base/error.h"
#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;
namespace fs = std::filesystem;

constexpr int kNoInput = static_cast<int>(ExitCode::no_input);
constexpr int kBadData = static_cast<int>(ExitCode::bad_data);
constexpr int kBadConfig = static_cast<int>(ExitCode::bad_config);

// A vocabulary whose embedding alone is larger than any machine's memory.
std::vector<std::string> too_large() {
  return {"model.vocab_size=16000000", "model.hidden_size=1000000"};
}

std::string warning(int code) {
  return "a run would be refused with exit code " + std::to_string(code) + ": ";
}

// The start-up table from its first heading on; what is free changes from one moment to the next.
std::vector<std::string> table_of(const std::string& text) {
  static const std::regex kAvailable(" of [^ ]+ [A-Za-z]+ available");
  std::vector<std::string> lines;
  for (const std::string& line : lines_of(text)) {
    if (lines.empty() && line != "Run") continue;
    lines.push_back(std::regex_replace(line, kAvailable, ""));
    if (line.starts_with("  checkpoints")) break;
  }
  return lines;
}

Finished plan(const TinyJob& job, const std::vector<std::string>& more = {}) {
  Finished finished = job.train(joined({"--dry-run"}, more));
  INFO(finished.err);
  CHECK(finished.code == 0);
  CHECK_THAT(finished.out, Contains("Dry run: nothing is trained or written."));
  return finished;
}

}  // namespace

TEST_CASE("dry run: prints the table that the run starts with, and writes nothing", "[dry_run]") {
  const TinyJob job({"train.steps=2", "schedule.warmup=1"});
  const Finished planned = plan(job);
  CHECK(planned.err == "");
  CHECK_FALSE(fs::exists(job.folder() + "/runs"));
  const std::vector<std::string> table = table_of(planned.out);
  CHECK(table.size() > 20);
  CHECK(table == table_of(job.must_train().err));
  // The tokenizer's vocabulary, the data's size and the memory are known.
  CHECK_THAT(planned.out, Contains("vocabulary 320") && Contains(" epochs") &&
                              Contains("activations") && !Contains("not available"));

  const Finished resumed = plan(job, {"--resume", "latest", "--set", "train.steps=3"});
  CHECK_THAT(resumed.out, Contains(", from step 2, to runs/tiny"));
  CHECK(resumed.err == "");
  const Finished in_the_way = plan(job);
  CHECK_THAT(in_the_way.err, Contains(warning(kBadConfig) + "'runs/tiny' already holds") &&
                                 Contains("--resume latest"));
  CHECK(plan(job, {"--overwrite"}).err == "");
  CHECK(job.saved_steps() == std::vector<int64_t>{2});
}

TEST_CASE("dry run: ranks share the cores, and what each takes, as they then do",
          "[dry_run][job]") {
  const TinyJob job({"train.steps=2", "schedule.warmup=1", "launch.ranks=2", "run.threads=0"});
  const std::vector<std::string> table = table_of(plan(job).out);
  CHECK(table.size() > 20);
  CHECK(table == table_of(job.must_train().err));
}

TEST_CASE("dry run: under mpirun the plan is for its ranks, and printed once", "[dry_run][job]") {
  const TinyJob job({"train.steps=2"});
  Launch launch = job.launch({"--dry-run"});
  std::string words;
  for (const std::string& word : launch.args) words += " '" + word + "'";
  launch.program = "/bin/bash";
  launch.args = {"-c",
                 "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1\n"
                 "exec mpirun --oversubscribe -np 2 " DSTRAIN_BINARY +
                     words};
  const Finished planned = run_program(launch);
  CHECK(planned.code == 0);
  CHECK_THAT(planned.out, Contains("2 ranks, data 2"));
  const std::string end = "Dry run: nothing is trained or written.";
  CHECK(planned.out.find(end) != std::string::npos);
  CHECK(planned.out.find(end) == planned.out.rfind(end));
}

TEST_CASE("dry run: names every missing file at once", "[dry_run]") {
  const TinyJob job({"data.tokenizer=no-tokenizer.json", "data.train=[{path: no-train}, {path: x}]",
                     "data.valid=[{path: no-valid}]"});
  const Finished planned = plan(job);
  for (const char* name : {"no-tokenizer.json", "no-train", "'x'", "no-valid"})
    CHECK_THAT(planned.err, Contains(name));
  CHECK(std::ssize(lines_of(planned.err)) == 4);
  CHECK_THAT(planned.err, Contains(warning(kNoInput)));
  CHECK_THAT(planned.out, Contains("no-train  not available\n"));
  CHECK(job.train().code == kNoInput);

  const TinyJob weights({"model.from=hf"});
  fs::create_directory(weights.folder() + "/hf");
  write_file(weights.folder() + "/hf/config.json", R"({"model_type": "llama", "vocab_size": 320,
      "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
      "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_act": "silu",
      "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0})");
  CHECK_THAT(plan(weights).err, Contains("model.safetensors"));
}

TEST_CASE("dry run: data that does not fit the job is a warning, as it is an error of the run",
          "[dry_run]") {
  const TinyJob job;
  const std::vector<std::string> longer = {"--set", "data.seq_len=12000",
                                           "--set", "model.max_position_embeddings=12000",
                                           "--set", "train.micro_batch=1"};
  CHECK_THAT(plan(job, longer).err, Contains(warning(kBadData)) && Contains("lower data.seq_len"));
  write_file(job.folder() + "/other.json",
             read_file(tiny_data_folder() + "/tokenizer.json") + "\n");
  const std::vector<std::string> other = {"--set", "data.tokenizer=other.json"};
  CHECK_THAT(plan(job, other).err, Contains("built with another tokenizer"));
  CHECK(job.train(other).code == kBadData);
  // The data need not use what the tokenizer has at its end.
  const std::vector<std::string> narrow = {"--set", "model.vocab_size=319"};
  const std::string sentence = "made with a vocabulary of 320, and model.vocab_size is 319";
  CHECK_THAT(plan(job, narrow).err, Contains(sentence));
  CHECK_THAT(job.train(narrow).err, Contains(sentence));
}

TEST_CASE("dry run: too little memory is said in the run's words", "[dry_run][memory]") {
  const TinyJob job(too_large());
  const Finished refused = job.train();
  CHECK(refused.code == kBadConfig);
  CHECK_THAT(refused.err,
             Contains("TiB of memory and ") && Contains("lower train.micro_batch") &&
                 Contains("; the largest part is checkpoint snapshot, 437 TiB of each rank\n"));
  CHECK_FALSE(fs::exists(job.folder() + "/runs"));
  const std::string err = plan(job).err;
  const std::regex free_memory("and [0-9.]+ [A-Za-z]+ are available");
  const std::string sentence =
      refused.err.substr(std::string("error: ").size());  // "this needs ...\n"
  CHECK_THAT(std::regex_replace(err, free_memory, ""),
             Contains(warning(kBadConfig) + std::regex_replace(sentence, free_memory, "")));
}

TEST_CASE("dry run: what this build lacks is marked, warnings are printed", "[dry_run]") {
  const TinyJob job({"precision.quantization=aware", "schedule.warmup=30"});
  const Finished planned = plan(job);
  CHECK_THAT(planned.out, Contains("not available: precision.quantization: aware "));
  CHECK_THAT(planned.err, Contains("schedule.warmup (30 steps) is longer than train.steps (20)"));
  CHECK_THAT(planned.out, Contains("never reached: warm-up takes 30 steps"));
  const Finished refused = job.train();
  CHECK(refused.code == kBadConfig);
  CHECK_THAT(refused.err, Contains("precision.quantization: aware is not available"));
}

TEST_CASE("dry run: a job of 64 ranks is planned in one process", "[dry_run][layout]") {
  const Finished planned = run_program(
      {"--config", std::string(DSTRAIN_SOURCE_DIR) + "/configs/v2-lite-3d.yaml", "--dry-run"});
  INFO(planned.text());
  CHECK(planned.code == 0);
  for (const char* text :
       {"15.7B parameters, 64 ranks (pipeline 2 x data 8 x tensor 4, expert 8, ZeRO-1)",
        "  stage 1          ranks 32-63: blocks 14-26, head\n",
        "  tensor              16 of 4     {0-3} {4-7} .. {60-63}\n",
        "  of a rank      1.09B parameters\n",
        "  parameters     values 4.05 GiB, gradients 4.05 GiB, moments 1.84 GiB = 9.94 GiB\n",
        "  in flight      activations of 2 micro-batches\n",
        "  expert buffer  294,917 rows of 2048, 8 experts on this rank\n",
        "Memory of rank 0, in stage 0, which needs the most\n"})
    CHECK_THAT(planned.out, Contains(text));
  // All 64 would start here.
  CHECK_THAT(planned.err, Contains(warning(kBadConfig) + "this needs 4."));
}

TEST_CASE("dry run: what ZeRO 3 keeps is in the table, and what it costs is a warning",
          "[dry_run][layout]") {
  const TinyJob job({"parallel.data=2", "parallel.zero=3", "train.global_batch=8",
                     "train.micro_batch=2", "train.steps=2", "schedule.warmup=1"});
  const Finished planned = plan(job);
  CHECK_THAT(planned.out, Contains("layout         2 ranks, data 2, ZeRO-3\n") &&
                              Contains("gathered blocks ") && Contains("gradients of blocks in"));
  CHECK_THAT(planned.err, Contains("warning: parallel.zero 3 sums gradients over ranks after"));
}

TEST_CASE("dry run: sums of gradients in bf16 are in the plan, on CPUs, too",
          "[dry_run][memory][ranks]") {
  const TinyJob job({"parallel.data=2", "train.global_batch=8", "train.micro_batch=2",
                     "train.steps=2", "schedule.warmup=1", "precision.reduce=bf16"});
  const Finished planned = plan(job);
  CHECK(planned.code == 0);
  CHECK_THAT(planned.out, Contains(", fp32, sums of gradients bf16\n") &&
                              Contains("gradients on their way") && !Contains("NCCL"));
}

TEST_CASE("dry run: a job for a GPU is planned in its types, on any machine", "[dry_run][memory]") {
  const TinyJob job({"run.device=cuda"});
  const std::string text = plan(job).out;
  CHECK_THAT(text, Contains(" threads, bf16\n") || Contains(" thread, bf16\n"));
  CHECK_THAT(text, Contains("total on the GPU") && Contains("total on the host"));
  CHECK_THAT(plan(job, {"--set", "precision.compute=tf32", "--set", "precision.moments=bf16"}).out,
             Contains(", tf32, moments bf16\n"));
  const Finished ranks = plan(job, {"--set", "parallel.data=2", "--set", "train.global_batch=4"});
  CHECK_THAT(ranks.out, Contains(", bf16\n") && Contains("lower halves of values"));
  CHECK_THAT(ranks.out, Contains("  beside it      NCCL's 968 MiB for 2 communicators, an estimate "
                                 "(one machine, NVLink)\n"));
}

TEST_CASE("dry run: a job that holds nowhere is refused", "[dry_run]") {
  const TinyJob job({"train.micro_batch=3"});
  const Finished refused = job.train({"--dry-run"});
  CHECK(refused.code == kBadConfig);
  CHECK_THAT(refused.err, Contains("train.micro_batch (3)"));
  CHECK(refused.out.empty());
}

}  // namespace dstrain::test
