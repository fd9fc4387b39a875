#include "test/support/tiny_job.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>

#include "core/base/rng.h"
#include "core/checkpoint/store.h"
#include "core/checkpoint/verify.h"

namespace dstrain::test {
namespace {

constexpr const char* kJob = R"(run: {{name: tiny, dir: runs, seed: 7, device: cpu, threads: 1}}
model:
  hidden_size: 32
  num_hidden_layers: 2
  intermediate_size: 64
  moe_intermediate_size: 24
  n_routed_experts: 4
  n_shared_experts: 1
  num_experts_per_tok: 2
  num_attention_heads: 2
  bias_update_speed: 0.01
data:
  tokenizer: {0}/tokenizer.json
  train: [{{path: {0}/train}}]
  valid: [{{path: {0}/valid}}]
  seq_len: 32
train: {{steps: 20, global_batch: 4, micro_batch: 2, eval_every: 5, eval_batches: 2}}
optimizer: {{lr: 3.0e-3, grad_clip: 0.5}}
schedule: {{name: constant, warmup: 4}}
checkpoint: {{every: 10}}
metrics: {{tensorboard: false}}
)";

class TinyData {
 public:
  TinyData() {
    write_file(folder_ / "train.txt", synthetic_text(/*seed=*/11, /*lines=*/400));
    write_file(folder_ / "valid.txt", synthetic_text(/*seed=*/12, /*lines=*/60));
    make({"tokenizer", "train", "train.txt", "--vocab-size", "320", "--output", "tokenizer.json"});
    for (const std::string name : {"train", "valid"})
      make({"data", "build", name + ".txt", "--split", "line", "--tokenizer", "tokenizer.json",
            "--output", name});
  }
  const std::string& path() const { return folder_.path(); }

 private:
  void make(const std::vector<std::string>& args) const {
    const Finished finished = run_program(args, folder_.path());
    INFO(finished.err);
    REQUIRE(finished.code == 0);
  }
  TempFolder folder_;
};

// The numbers of a step that follow from the job alone.
constexpr std::array kStepFields = {"loss",         "grad_norm",          "lr",
                                    "total_tokens", "load_max_over_mean", "balance_loss",
                                    "skipped_total"};

std::string joined_fields(const std::string& line, const auto& keys) {
  std::string out;
  for (const char* key : keys) out += fmt::format("{} {} ", key, json_field(line, key));
  return out;
}

int64_t to_int(const std::string& text) {
  int64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

template <class Map>
std::string map_difference(const char* what, const Map& expected, const Map& got) {
  for (const auto& [key, value] : expected) {
    const auto at = got.find(key);
    if (at == got.end()) return fmt::format("{} {} is missing", what, key);
    if (at->second != value)
      return fmt::format("{} {}:\n  expected {}\n  got      {}", what, key, value, at->second);
  }
  for (const auto& [key, value] : got)
    if (!expected.contains(key)) return fmt::format("{} {} is too many", what, key);
  return "";
}

}  // namespace

std::vector<std::string> latent_attention() {
  return {"model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8",
          "model.v_head_dim=8"};
}

std::vector<std::string> joined(std::vector<std::string> a, const std::vector<std::string>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

std::string synthetic_text(uint64_t seed, int64_t lines) {
  constexpr std::array kWords = {
      "the",  "river", "stone", "light", "under", "over",  "moves", "slowly", "seven", "birds",
      "and",  "a",     "quiet", "song",  "of",    "rain",  "while", "old",    "trees", "wait",
      "long", "road",  "home",  "again", "night", "comes", "early", "north",  "wind",  "turns"};
  std::string text;
  uint64_t draw = 0;
  const auto below = [&](uint64_t n) {
    return static_cast<uint64_t>(random_uniform(seed, /*stream=*/0, draw++) *
                                 static_cast<double>(n));
  };
  for (int64_t line = 0; line < lines; ++line) {
    // Pairs of words, so that there is something to learn.
    for (uint64_t pairs = 2 + below(6); pairs > 0; --pairs) {
      const uint64_t word = below(kWords.size());
      text += fmt::format("{} {} ", kWords[word], kWords[(7 * word + 3) % kWords.size()]);
    }
    text.back() = '\n';
  }
  return text;
}

const std::string& tiny_data_folder() {
  static const TinyData data;
  return data.path();
}

TinyJob::TinyJob(std::vector<std::string> settings) : settings_(std::move(settings)) {
  write_file(folder_ / "job.yaml", fmt::format(kJob, tiny_data_folder()));
}

std::string TinyJob::checkpoint(int64_t step) const {
  return fmt::format("{}/step-{:08}", checkpoints(), step);
}

Launch TinyJob::launch(const std::vector<std::string>& more) const {
  Launch launch;
  launch.folder = folder();
  launch.args = {"--config", "job.yaml"};
  for (const std::string& setting : settings_)
    launch.args.insert(launch.args.end(), {"--set", setting});
  launch.args.insert(launch.args.end(), more.begin(), more.end());
  return launch;
}

Finished TinyJob::train(const std::vector<std::string>& more) const {
  return run_program(launch(more));
}

Finished TinyJob::must_train(const std::vector<std::string>& more) const {
  Finished finished = train(more);
  INFO(finished.err);
  REQUIRE(finished.code == 0);
  return finished;
}

std::vector<int64_t> TinyJob::saved_steps() const {
  std::vector<int64_t> steps;
  for (const StoredCheckpoint& checkpoint : CheckpointStore(checkpoints(), 1).list().checkpoints)
    steps.push_back(checkpoint.step);
  std::reverse(steps.begin(), steps.end());
  return steps;
}

int64_t TinyJob::num_leftovers() const {
  const StoreListing listing = CheckpointStore(checkpoints(), 1).list();
  return std::ssize(listing.leftovers) + std::ssize(listing.unknown);
}

std::string TinyJob::damage() const {
  for (const StoredCheckpoint& checkpoint : CheckpointStore(checkpoints(), 1).list().checkpoints) {
    const CheckpointReport report = check_checkpoint(checkpoint.path, CheckDepth::contents);
    if (!report.ok()) return fmt::format("{}: {}", checkpoint.path, report.summary());
  }
  return "";
}

RunTrace trace_of(const TinyJob& job) {
  RunTrace trace;
  for (const std::string& line : events(job, "step"))
    trace.steps[to_int(json_field(line, "step"))] += joined_fields(line, kStepFields);
  for (const std::string& line : events(job, "eval"))
    trace.evals[to_int(json_field(line, "step"))] +=
        joined_fields(line, std::array{"set", "loss", "tokens"});
  const std::vector<int64_t> saved = job.saved_steps();
  if (!saved.empty()) trace.state = checkpoint_state(job.checkpoint(saved.back()));
  return trace;
}

std::map<std::string, std::string> checkpoint_state(const std::string& checkpoint_folder) {
  const Manifest manifest = load_manifest(checkpoint_folder);
  std::map<std::string, std::string> state;
  for (const ManifestTensor& tensor : manifest.tensors)
    for (const ManifestSlice& slice : tensor.slices)
      state[slice_key(tensor, slice)] = fmt::format("{:016x}", slice.hash);
  for (const auto& [name, count] : manifest.meta.counters)
    state["counter " + name] = fmt::to_string(count);
  for (const auto& [name, value] : manifest.meta.values)
    state["value " + name] = fmt::to_string(value);
  state["step"] = fmt::to_string(manifest.meta.step);
  state["samples"] = fmt::to_string(manifest.meta.samples_consumed);
  return state;
}

std::string difference(const RunTrace& expected, const RunTrace& got) {
  for (const std::string& text : {map_difference("step", expected.steps, got.steps),
                                  map_difference("evaluation at step", expected.evals, got.evals),
                                  map_difference("state", expected.state, got.state)})
    if (!text.empty()) return text;
  return "";
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

std::vector<std::string> events(const TinyJob& job, const std::string& event) {
  std::vector<std::string> found;
  for (const std::string& line : lines_of(read_file(job.metrics())))
    if (json_field(line, "event") == event) found.push_back(line);
  return found;
}

std::string json_field(const std::string& line, const std::string& key) {
  const std::string name = "\"" + key + "\":";
  size_t begin = line.find(name);
  if (begin == std::string::npos) return "";
  begin += name.size();
  if (line[begin] == '"') return line.substr(begin + 1, line.find('"', begin + 1) - begin - 1);
  return line.substr(begin, line.find_first_of(",}", begin) - begin);
}

int64_t last_step(const TinyJob& job) {
  const std::vector<std::string> steps = events(job, "step");
  return steps.empty() ? 0 : to_int(json_field(steps.back(), "step"));
}

}  // namespace dstrain::test
