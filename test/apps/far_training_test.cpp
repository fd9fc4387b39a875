// Whole runs of the trainer on memory that the host cannot reach, with results read a step late,
// beside runs on a CPU: the same records, and the same checkpoints to the byte of every tensor.
#include <cstdio>
#include <mutex>

#include "apps/trainer.h"
#include "core/backend/cpu_backend.h"
#include "parallel/layout_run.h"
#include "test/support/far_backend.h"
#include "test/support/tiny_job.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

// Numbers of records that follow from the job alone, as text.
class Notes : public MetricsSink {
 public:
  explicit Notes(std::vector<std::string>& lines) : lines_(lines) {}
  void on_start(const StartupInfo&) override {}
  void on_step(const StepRecord& r) override {
    add("step %lld: %a %a %d", r.step, r.loss, r.grad_norm, r.skipped ? 1 : 0);
  }
  void on_eval(const EvalRecord& r) override { add("eval %lld: %a", r.step, r.loss); }
  void on_checkpoint(const CheckpointRecord& r) override {
    add("saved %lld: %d", r.step, r.ok ? 1 : 0);
  }
  void on_end(const RunSummary&) override {}

 private:
  template <class... Numbers>
  void add(const char* format, int64_t step, Numbers... numbers) {
    char line[160];
    std::snprintf(line, sizeof line, format, static_cast<long long>(step), numbers...);
    lines_.emplace_back(line);
  }
  std::vector<std::string>& lines_;
};

struct Result {
  std::vector<std::string> lines;
  std::map<std::string, std::string> state;  // of the last checkpoint
};

class Job {
 public:
  explicit Job(bool async) {
    config_.run.name = "tiny";
    config_.run.seed = 7;
    config_.run.threads = 1;
    config_.model = tiny_moe();
    config_.model.vocab_size = 0;
    config_.model.bias_update_speed = 0.01;
    config_.data.tokenizer = tiny_data_folder() + "/tokenizer.json";
    config_.data.train = {{tiny_data_folder() + "/train", 1.0}};
    config_.data.valid = {{tiny_data_folder() + "/valid", 1.0}};
    config_.data.seq_len = 32;
    config_.train.steps = 7;
    config_.train.global_batch = 6;
    config_.train.micro_batch = 2;
    config_.train.eval_every = 3;
    config_.train.eval_batches = 2;
    config_.optimizer.grad_clip = 0.5;
    config_.precision.compute = ComputeType::fp32;
    config_.checkpoint.every = 2;
    config_.checkpoint.async = async;
    config_.metrics.tensorboard = false;
    resolve_vocab_size(config_);
  }

  Result train(const std::string& folder, int64_t steps, bool far, const std::string& resume = "") {
    config_.run.dir = folder;
    config_.train.steps = steps;
    Result result;
    MetricsHub hub;
    hub.add(std::make_unique<Notes>(result.lines));
    TrainerOptions options;
    options.resume = resume;
    if (far) options.make_backend = [] { return std::make_unique<FarBackend>(); };
    Trainer trainer(config_, options, hub);
    REQUIRE(trainer.run() == ExitCode::ok);
    char name[32];
    std::snprintf(name, sizeof name, "step-%08lld", static_cast<long long>(steps));
    result.state = checkpoint_state(folder + "/tiny/checkpoints/" + name);
    return result;
  }

 private:
  Config config_;
};

std::vector<std::string> starting_with(const std::vector<std::string>& lines,
                                       const std::string& word) {
  std::vector<std::string> out;
  for (const std::string& line : lines)
    if (line.starts_with(word)) out.push_back(line);
  return out;
}

}  // namespace

TEST_CASE("far training: records and checkpoints are those of a run on a CPU", "[trainer]") {
  const bool async = GENERATE(true, false);
  CAPTURE(async);
  Job job(async);
  const TempFolder cpu, far;
  const Result expected = job.train(cpu.path(), 7, false), got = job.train(far.path(), 7, true);
  for (const char* word : {"step", "eval", "saved"}) {
    CHECK(starting_with(got.lines, word) == starting_with(expected.lines, word));
    CHECK_FALSE(starting_with(got.lines, word).empty());
  }
  CHECK(got.state == expected.state);

  // What one saved the other goes on with.
  const Result on_cpu = job.train(far.path(), 10, false, "latest");
  const Result on_far = job.train(cpu.path(), 10, true, "latest");
  CHECK(on_far.state == on_cpu.state);
  CHECK(starting_with(on_far.lines, "step") == starting_with(on_cpu.lines, "step"));
}

TEST_CASE("far training: a recorded routing is replayed, and a run compared, on either side",
          "[trainer]") {
  Config config;
  config.model = tiny_moe();
  config.data.seq_len = 16;
  config.train.micro_batch = 2;
  config.train.global_batch = 6;
  config.precision.compute = ComputeType::fp32;
  LayoutRunOptions options;
  options.steps = 3;
  const auto far = [] { return std::make_unique<FarBackend>(); };
  for (const bool first_is_far : {false, true}) {
    options.record = std::make_shared<RoutingRecord>(config.train.global_batch, config.data.seq_len,
                                                     config.model.num_experts_per_tok);
    options.replay = false;
    options.make_backend = {};
    if (first_is_far) options.make_backend = far;
    const LayoutRun recorded = run_layout(config, MeshShape{}, options);
    options.replay = true;
    options.make_backend = {};
    if (!first_is_far) options.make_backend = far;
    const LayoutRun replayed = run_layout(config, MeshShape{}, options);
    CHECK(bit_difference(recorded, replayed) == "");
    CHECK(replayed.flips.tokens == 0);
  }
}

}  // namespace dstrain::test
