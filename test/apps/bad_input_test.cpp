// Everything a user can get wrong around a run: each is a sentence that names the culprit and an
// exit code of core/base/error.h, never a crash, a hang, or a silent start from scratch.
#include <fmt/format.h>

#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>

#include "apps/assemble.h"
#include "core/base/error.h"
#include "core/checkpoint/safetensors.h"
#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;
namespace fs = std::filesystem;

constexpr int kUsage = static_cast<int>(ExitCode::usage);
constexpr int kBadData = static_cast<int>(ExitCode::bad_data);
constexpr int kNoInput = static_cast<int>(ExitCode::no_input);
constexpr int kBadConfig = static_cast<int>(ExitCode::bad_config);

// Ends within seconds with this code and a sentence that has all of the parts.
void check_refused(const Finished& refused, int code, const std::vector<std::string>& parts) {
  INFO(refused.err);
  CHECK(refused.signal == 0);
  CHECK(refused.code == code);
  for (const std::string& part : parts) CHECK_THAT(refused.err, Contains(part));
  CHECK_THAT(refused.err, Contains("error: "));
  CHECK_THAT(refused.err, !Contains("terminate called") && !Contains("Assertion"));
  CHECK(refused.seconds < 10);
}

void flip_bit(const std::string& path, size_t byte) {
  std::string bytes = read_file(path);
  REQUIRE(byte < bytes.size());
  bytes[byte] = static_cast<char>(bytes[byte] ^ 0x10);
  write_file(path, bytes);
}

// The tiny job's training data in a folder of the test's own.
std::string copy_dataset(const TinyJob& job) {
  const std::string copy = job.folder() + "/copy";
  fs::copy(tiny_data_folder() + "/train", copy, fs::copy_options::recursive);
  return copy;
}

std::string train_on(const std::string& path) {
  return "data.train=[{path: " + path + "}]";
}

// A trained tiny model as a Hugging Face folder.
std::string export_model(const TinyJob& job) {
  job.must_train({"--set", "train.steps=2"});
  const std::string model = job.folder() + "/hf";
  const Finished exported = run_program({"export", job.run_folder(), "--output", model});
  INFO(exported.err);
  REQUIRE(exported.code == 0);
  return model;
}

// The safetensors file with another header: 8 bytes of length, the header, the data.
void replace_header(const std::string& path, const std::function<void(std::string&)>& change) {
  const std::string bytes = read_file(path);
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  std::string header = bytes.substr(sizeof length, length);
  const std::string data = bytes.substr(sizeof length + length);
  change(header);
  length = header.size();
  write_file(path,
             std::string(reinterpret_cast<const char*>(&length), sizeof length) + header + data);
}

}  // namespace

TEST_CASE("bad input: job files", "[bad_input]") {
  const TinyJob job;
  const std::string good = read_file(job.folder() + "/job.yaml");
  struct Case {
    std::string name, text;
    std::vector<std::string> parts;
  };
  std::string typo = good;
  typo.replace(typo.find("hidden_size"), 11, "hiden_size");
  std::string bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n";
  for (char c = 'b'; c < 'k'; ++c)
    bomb += fmt::format("{0}: &{0} [*{1}, *{1}, *{1}, *{1}, *{1}, *{1}, *{1}, *{1}, *{1}]\n", c,
                        static_cast<char>(c - 1));
  for (const auto& [name, text, parts] :
       {Case{"empty", "", {"the job file is empty"}},
        {"typo", typo, {"typo.yaml:3:3", "unknown key 'hiden_size'", "did you mean 'hidden_size'"}},
        {"bomb", bomb, {"bomb.yaml:1:", "anchors"}},
        {"nul", std::string("run: {name: a\0b}", 16), {"NUL"}},
        {"deep", std::string(100000, '['), {"deep.yaml:1:"}},
        {"large", std::string(20 << 20, ' '), {"larger than"}},
        {"text", "Once upon a time\nthere was no key.\n", {"text.yaml:1:1"}},
        {"twice", good + "run: {name: again}\n", {"twice.yaml:", "run"}},
        {"wrong", "run: {name: x, seed: many}\n", {"wrong.yaml:1:22", "seed"}}}) {
    CAPTURE(name);
    write_file(job.folder() + "/" + name + ".yaml", text);
    const Finished refused = run_program({"--config", name + ".yaml"}, job.folder());
    check_refused(refused, kBadConfig, parts);
    CHECK(refused.seconds < 2);
  }
  check_refused(run_program({"--config", "nowhere.yaml"}, job.folder()), kNoInput,
                {"nowhere.yaml"});
  check_refused(run_program({"--config", "."}, job.folder()), kBadConfig, {"'.'", "folder"});
  check_refused(run_program(std::vector<std::string>{}), kUsage, {"nothing to do"});
  CHECK_FALSE(fs::exists(job.folder() + "/runs"));
}

TEST_CASE("bad input: datasets and tokenizers", "[bad_input]") {
  const TinyJob job;
  write_file(job.folder() + "/empty.bin", "");
  fs::create_directory(job.folder() + "/emptydir");
  const std::string data = copy_dataset(job);
  write_file(job.folder() + "/pretender.json", "{\"model\": 3}");

  const auto with = [&](const std::string& setting) { return job.train({"--set", setting}); };
  check_refused(with(train_on("nowhere")), kNoInput, {"nowhere", "data build"});
  check_refused(with(train_on("empty.bin")), kBadData, {"empty.bin"});
  check_refused(with(train_on("emptydir")), kNoInput, {"emptydir"});
  check_refused(with(train_on("/dev/null")), kBadData, {"/dev/null"});
  check_refused(with(train_on("job.yaml")), kBadData, {"job.yaml"});
  check_refused(with("data.train=[]"), kBadConfig, {"data.train"});
  check_refused(with("data.tokenizer=nowhere.json"), kNoInput, {"nowhere.json"});
  check_refused(with("data.tokenizer=emptydir"), kBadData, {"emptydir"});
  check_refused(with("data.tokenizer=empty.bin"), kBadData, {"empty.bin"});
  check_refused(with("data.tokenizer=pretender.json"), kBadData, {"pretender.json"});

  // A vocabulary that is too small for the data, and sequences that are too long for it.
  const Finished small = with("model.vocab_size=100");
  check_refused(small, kBadData, {"tokens-00000.bin", "byte ", "vocabulary has 100"});
  const Finished longer =
      job.train({"--set", "data.seq_len=12000", "--set", "model.max_position_embeddings=12000",
                 "--set", "model.hidden_size=8", "--set", "train.micro_batch=1"});
  check_refused(longer, kBadData, {"/train", "12001", "lower data.seq_len"});

  fs::resize_file(data + "/tokens-00000.bin", fs::file_size(data + "/tokens-00000.bin") / 2);
  check_refused(with(train_on(data)), kBadData, {"copy/tokens-00000.bin", "damaged at byte"});
}

TEST_CASE("bad input: a flipped bit anywhere in a dataset is found and its file named",
          "[bad_input]") {
  const TinyJob job({"train.steps=150"});
  const std::string data = copy_dataset(job);
  for (const std::string name : {"tokens-00000.bin", "documents.bin", "index.bin"}) {
    const std::string path = data + "/" + name, bytes = read_file(path);
    for (const size_t byte : {size_t{0}, bytes.size() / 2, bytes.size() - 1}) {
      CAPTURE(name, byte);
      flip_bit(path, byte);
      check_refused(job.train({"--overwrite", "--set", train_on(data)}), kBadData, {name});
      write_file(path, bytes);
    }
  }
  job.must_train({"--overwrite", "--set", train_on(data)});
}

TEST_CASE("bad input: a checkpoint of another model, and no checkpoint", "[bad_input]") {
  const TinyJob job({"train.steps=4"});
  job.must_train();
  const std::string metrics = read_file(job.metrics());
  const auto resume = [&](const std::string& from, const std::vector<std::string>& more) {
    return job.train(joined({"--resume", from, "--set", "train.steps=8"}, more));
  };
  check_refused(resume("latest", {"--set", "model.hidden_size=64"}), kBadData,
                {"step-00000004", "[320, 32]", "[320, 64]"});
  check_refused(resume("latest", {"--set", "model.n_shared_experts=0"}), kBadData,
                {"step-00000004", "shared_experts", "no place"});
  check_refused(resume("latest", {"--set", "model.num_hidden_layers=3"}), kBadData,
                {"step-00000004", "layers.2"});
  check_refused(resume("nowhere", {}), kNoInput, {"nowhere", "holds no checkpoint"});
  check_refused(resume("job.yaml", {}), kNoInput, {"job.yaml"});
  CHECK(read_file(job.metrics()) == metrics);  // nothing of the run was touched
  CHECK(job.saved_steps() == std::vector<int64_t>{4});
}

TEST_CASE("bad input: the newest checkpoint is damaged, then all are", "[bad_input]") {
  const TinyJob whole({"checkpoint.every=4"}), job({"checkpoint.every=4"});
  whole.must_train();
  job.must_train({"--set", "train.steps=12"});
  REQUIRE(job.saved_steps() == std::vector<int64_t>{4, 8, 12});
  const std::string shard = "/rank-00000.safetensors";
  const size_t middle = fs::file_size(job.checkpoint(12) + shard) / 2;
  flip_bit(job.checkpoint(12) + shard, middle);

  SECTION("falls back to the one before, says so, and ends as if nothing had been") {
    const Finished fallen_back = job.train({"--resume", "latest"});
    INFO(fallen_back.err);
    CHECK(fallen_back.code == 0);
    CHECK_THAT(fallen_back.err,
               Contains("checkpoint rejected: step-00000012: rank-00000.safetensors") &&
                   Contains("mismatch at tensor") && Contains("step-00000008"));
    CHECK(difference(trace_of(whole), trace_of(job)) == "");
    CHECK(job.damage() == "");
  }
  SECTION("none is whole: 65 with every reason, and nothing starts") {
    fs::resize_file(job.checkpoint(8) + shard, middle);
    fs::remove(job.checkpoint(4) + "/manifest.json");
    const std::string metrics = read_file(job.metrics());
    const Finished refused = job.train({"--resume", "latest"});
    check_refused(refused, kBadData,
                  {"no checkpoint in", "step-00000012: ", "step-00000008: ", "step-00000004: ",
                   "manifest.json", "--overwrite"});
    CHECK_THAT(refused.err, !Contains("scratch"));
    CHECK(read_file(job.metrics()) == metrics);
    CHECK(job.saved_steps() == std::vector<int64_t>{4, 8, 12});
    check_refused(job.train({"--resume", job.checkpoint(12)}), kBadData,
                  {"step-00000012", "mismatch"});
    for (const char* command : {"eval", "generate"})
      check_refused(run_program({command, "--run", job.run_folder()}), kBadData,
                    {"no checkpoint in"});
    check_refused(run_program({"export", job.run_folder(), "--output", job.folder() + "/hf"}),
                  kBadData, {"no checkpoint in"});
    CHECK(run_program({"ckpt", "verify", job.run_folder()}).code == kBadData);
    job.must_train({"--overwrite"});
    CHECK(job.damage() == "");
  }
}

TEST_CASE("bad input: weights to import", "[bad_input]") {
  const TinyJob job(latent_attention());
  const std::string model = export_model(job), weights = model + "/model.safetensors";
  const std::string bytes = read_file(weights), config = read_file(model + "/config.json");
  const auto import = [&] {
    return run_program({"import", model, "--output", job.folder() + "/imported"});
  };
  const auto replaced = [](std::string text, const std::string& from, const std::string& to) {
    const size_t at = text.find(from);
    REQUIRE(at != std::string::npos);
    return text.replace(at, from.size(), to);
  };

  SECTION("the length of the header") {
    for (const uint64_t length :
         {uint64_t{0}, uint64_t{1} << 20, uint64_t{1} << 40, ~uint64_t{0}}) {
      CAPTURE(length);
      std::string broken = bytes;
      std::memcpy(broken.data(), &length, sizeof length);
      write_file(weights, broken);
      check_refused(import(), kBadData, {"model.safetensors"});
    }
  }
  SECTION("a header of a hundred megabytes") {
    replace_header(weights, [](std::string& header) { header.append(101 << 20, ' '); });
    check_refused(import(), kBadData, {"model.safetensors"});
  }
  SECTION("tensors that overlap, leave a hole, or end behind the file") {
    for (const std::string offsets :
         {"\"data_offsets\":[0,4]", "\"data_offsets\":[4,8]", "\"data_offsets\":[0,99999999999]"}) {
      CAPTURE(offsets);
      write_file(weights, bytes);
      replace_header(weights, [&](std::string& header) {
        const size_t at = header.find("\"data_offsets\":");
        header.replace(at, header.find(']', at) + 1 - at, offsets);
      });
      check_refused(import(), kBadData, {"model.safetensors"});
    }
  }
  SECTION("truncated, empty, missing, a folder") {
    write_file(weights, bytes.substr(0, bytes.size() / 2));
    check_refused(import(), kBadData, {"model.safetensors"});
    write_file(weights, "");
    check_refused(import(), kBadData, {"model.safetensors"});
    fs::remove(weights);
    check_refused(import(), kNoInput, {"model.safetensors"});
    fs::create_directory(weights);
    check_refused(import(), kBadData, {"model.safetensors"});
  }
  SECTION("a tensor of another shape or name, and a configuration that does not fit") {
    replace_header(weights, [&](std::string& header) {
      header = replaced(header, "model.embed_tokens.weight", "model.embed_tokens.wait");
    });
    check_refused(import(), kBadData, {"model.embed_tokens.w"});
    write_file(weights, bytes);
    write_file(model + "/config.json",
               replaced(config, "\"hidden_size\": 32", "\"hidden_size\": 64"));
    check_refused(import(), kBadData, {"model.embed_tokens.weight", "another shape"});
    write_file(model + "/config.json", "{");
    check_refused(import(), kBadData, {"config.json"});
    fs::remove(model + "/config.json");
    check_refused(import(), kNoInput, {"config.json"});
  }
  CHECK_FALSE(fs::exists(job.folder() + "/imported"));
}

TEST_CASE("bad input: weights that are not finite cost the steps that meet them",
          "[bad_input][nan]") {
  const TinyJob job(latent_attention());
  const std::string model = export_model(job), weights = model + "/model.safetensors";
  const SafetensorsReader reader(weights);
  const auto poison = [&](const std::string& tensor, int64_t element, float value) {
    std::string bytes = read_file(weights);
    std::memcpy(bytes.data() + reader.at(tensor).offset + 4 * element, &value, sizeof value);
    write_file(weights, bytes);
  };
  const auto train = [&](int64_t steps) {
    return job.train({"--overwrite", "--set", "model.from=" + model, "--set",
                      fmt::format("train.steps={}", steps)});
  };
  const float bad = GENERATE(NAN, INFINITY);
  CAPTURE(bad);

  SECTION("one that every token meets: nothing is ever updated") {
    poison("model.norm.weight", 3, bad);
    REQUIRE(train(0).code == 0);
    const auto before = checkpoint_state(job.checkpoint(0));
    RunningProgram program(
        job.launch({"--overwrite", "--set", "model.from=" + model, "--set", "train.steps=1000000",
                    "--set", "train.max_skipped_steps=1000000"}));
    REQUIRE(program.wait_until([&] { return last_step(job) >= 6; }));
    program.send(SIGTERM);
    const Finished left = program.wait();
    INFO(left.err);
    REQUIRE(left.code == static_cast<int>(ExitCode::preempted));
    const int64_t step = last_step(job);
    const auto after = checkpoint_state(job.checkpoint(step));
    for (const auto& [name, hash] : before)
      if (name.starts_with("param.") || name.starts_with("adamw.")) CHECK(after.at(name) == hash);
    CHECK(after.at("counter skipped_steps") == fmt::to_string(step));
    CHECK(after.at("counter updates") == "0");
    CHECK_THAT(left.err, Contains("step 6: the gradient is not finite") &&
                             Contains(fmt::format("{} steps skipped", step)));
    CHECK(json_field(events(job, "step").back(), "skipped") == "true");
  }
  SECTION("nothing else in a run that is too short for the limit: it has failed") {
    poison("model.norm.weight", 3, bad);
    check_refused(train(6), static_cast<int>(ExitCode::failure), {"6 steps in a row", "step 6"});
    CHECK(job.saved_steps().empty());
  }
  SECTION("too many in a row end the run, which saves nothing over what was there") {
    poison("model.norm.weight", 3, bad);
    const Finished ended =
        job.train({"--overwrite", "--set", "model.from=" + model, "--set", "train.steps=20",
                   "--set", "checkpoint.every=1", "--set", "train.max_skipped_steps=4"});
    check_refused(ended, static_cast<int>(ExitCode::failure), {"4 steps in a row", "step 4"});
    CHECK(job.saved_steps().empty());
    CHECK(last_step(job) == 4);
  }
  SECTION("one that some batches meet: those steps only") {
    const std::string whole = read_file(weights);
    int64_t skipped = 0;
    int code = 1;  // of a token that is in nearly every batch
    for (int64_t token = 319; token >= 257 && (skipped == 0 || code == 1); --token) {
      write_file(weights, whole);
      poison("model.embed_tokens.weight", 32 * token, bad);
      code = train(12).code;
      skipped = 0;
      for (const std::string& line : events(job, "step"))
        skipped += json_field(line, "skipped") == "true";
    }
    REQUIRE(code == 0);
    CHECK(skipped > 0);
    CHECK(skipped < 12);
    const auto state = checkpoint_state(job.checkpoint(12));
    CHECK(state.at("counter skipped_steps") == fmt::to_string(skipped));
    CHECK(state.at("counter updates") == fmt::to_string(12 - skipped));
    CHECK(json_field(events(job, "end").back(), "skipped_total") == fmt::to_string(skipped));
  }
}

TEST_CASE("bad input: what this build cannot do is planned, and refused by name", "[bad_input]") {
  const std::vector<std::string> preset = {"--model",     "deepseek-72b", "--quantization", "aware",
                                           "--precision", "bf16",         "--batch_size",   "256"};
  const TempFolder empty;
  const Finished plan = run_program(joined(preset, {"--dry-run"}), empty.path());
  INFO(plan.text());
  CHECK(plan.code == 0);
  CHECK_THAT(plan.out, Contains("quantization: aware") && Contains("compute: bf16") &&
                           Contains("global_batch: 256") &&
                           Contains("not available: precision.quantization: aware") &&
                           Contains("71.7B parameters"));
  // bf16 is what a build with CUDA computes in.
  const bool has_cuda = build_capabilities().cuda;
  if (has_cuda)
    CHECK_THAT(plan.out, !Contains("not available: precision.compute"));
  else
    CHECK_THAT(plan.out, Contains("not available: precision.compute: bf16"));
  CHECK_THAT(plan.err, Contains("exit code 78: ") && Contains("data.train is missing"));
  check_refused(run_program(preset, empty.path()), kBadConfig,
                {"precision.quantization: aware is not available",
                 has_cuda ? "" : "precision.compute: bf16 is not available"});

  const std::vector<std::string> quickstart = {
      "--config",
      std::string(DSTRAIN_SOURCE_DIR) + "/configs/quickstart.yaml",
      "--batch_size",
      "2048",
      "--lr",
      "5e-5",
      "--warmup_steps",
      "1000",
      "--gradient_accumulation",
      "8"};
  const Finished resolved = run_program(joined(quickstart, {"--dry-run"}), empty.path());
  INFO(resolved.text());
  CHECK(resolved.code == 0);
  CHECK_THAT(resolved.out, Contains("global_batch: 2048") && Contains("micro_batch: 256") &&
                               Contains("lr: 5e-05") && Contains("warmup: 1000"));
  for (const char* name : {"tokenizer.json", "train", "valid"})
    CHECK_THAT(resolved.err, Contains(std::string("exit code 66: ")) &&
                                 Contains(std::string("'data/kjv/") + name + "'"));
  check_refused(run_program(quickstart, empty.path()), kNoInput, {"data/kjv/"});
  CHECK(fs::is_empty(empty.path()));  // neither planned nor refused runs leave anything
}

TEST_CASE("bad input: every option with every kind of nonsense", "[bad_input]") {
  const TinyJob job({"train.steps=1"});
  for (const std::string option :
       {"--batch_size", "--lr", "--warmup_steps", "--gradient_accumulation", "--model",
        "--precision", "--quantization", "--resume", "--color", "--set", "--config"}) {
    for (const std::string value :
         {"", "-1", "1e999", "123456789012345678901x", "nan", "\xff\xfe", "[", "--"}) {
      CAPTURE(option, value);
      const Finished refused = job.train({option, value});
      INFO(refused.err);
      CHECK(refused.signal == 0);
      CHECK((refused.code == kUsage || refused.code == kBadConfig || refused.code == kNoInput));
      CHECK(refused.err.size() < 8192);
    }
    CHECK(job.train({option}).code == kUsage);
  }
  check_refused(run_program({"--cofnig", "x.yaml"}), kUsage, {"--config"});
  check_refused(run_program({"trian"}), kUsage, {"trian"});
  CHECK(last_step(job) == 0);
}

}  // namespace dstrain::test
