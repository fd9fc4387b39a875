// Whole runs of the trainer on memory that the host cannot reach, with results read a step late,
// beside runs on a CPU: the same records, and the same checkpoints to the byte of every tensor.
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <mutex>
#include <thread>

#include "apps/trainer.h"
#include "core/backend/cpu_backend.h"
#include "parallel/layout_run.h"
#include "test/support/far_backend.h"
#include "test/support/simulated_time.h"
#include "test/support/tiny_job.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

// Numbers of records that follow from the job alone, as text.
class Notes : public MetricsSink {
 public:
  Notes(std::vector<std::string>& lines, std::vector<StepRecord>& steps)
      : lines_(lines), steps_(steps) {}
  void on_start(const StartupInfo&) override {}
  void on_step(const StepRecord& r) override {
    steps_.push_back(r);
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
  std::vector<StepRecord>& steps_;
};

struct Result {
  std::vector<std::string> lines;
  std::vector<StepRecord> steps;
  std::map<std::string, std::map<std::string, std::string>> states;  // by folder of a checkpoint
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
  Config& config() { return config_; }
  void set_far(std::function<std::unique_ptr<Backend>()> make) { make_far_ = std::move(make); }

  Result train(const std::string& folder, int64_t steps, bool far, const std::string& resume = "") {
    config_.run.dir = folder;
    config_.train.steps = steps;
    Result result;
    MetricsHub hub;
    hub.add(std::make_unique<Notes>(result.lines, result.steps));
    TrainerOptions options;
    options.resume = resume;
    if (far) options.make_backend = make_far_;
    Trainer trainer(config_, options, hub);
    const ExitCode code = trainer.run();
    REQUIRE(code == ExitCode::ok);
    const std::string checkpoints = folder + "/tiny/checkpoints";
    if (!std::filesystem::exists(checkpoints)) return result;
    for (const auto& entry : std::filesystem::directory_iterator(checkpoints))
      result.states[entry.path().filename()] = checkpoint_state(entry.path());
    return result;
  }

 private:
  Config config_;
  // Saved state is copied beside the steps that follow, as late as they allow.
  std::function<std::unique_ptr<Backend>()> make_far_ = [] {
    return std::make_unique<FarBackend>(1, std::chrono::milliseconds(100));
  };
};

// Whose host memory cannot be had on other threads, such as the one that takes a snapshot's.
class NoSnapshot : public FarBackend {
 public:
  void* allocate(int64_t bytes, MemoryKind kind) override {
    if (kind == MemoryKind::host && std::this_thread::get_id() != owner_)
      throw RuntimeFailure("no memory for a snapshot");
    return FarBackend::allocate(bytes, kind);
  }

 private:
  const std::thread::id owner_ = std::this_thread::get_id();
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
  CHECK(got.states.size() == 3);
  CHECK(got.states == expected.states);

  // What one saved the other goes on with.
  const Result on_cpu = job.train(far.path(), 10, false, "latest");
  const Result on_far = job.train(cpu.path(), 10, true, "latest");
  CHECK(on_far.states == on_cpu.states);
  CHECK(starting_with(on_far.lines, "step") == starting_with(on_cpu.lines, "step"));
}

TEST_CASE("far training: a run stopped at a save and resumed has the bits of one that went on",
          "[trainer]") {
  Job job(true);
  job.config().schedule = {.name = ScheduleName::constant, .warmup = {0, false}};
  const TempFolder straight, resumed;
  const Result expected = job.train(straight.path(), 8, true);
  job.train(resumed.path(), 4, true);
  CHECK(job.train(resumed.path(), 8, true, "latest").states == expected.states);
}

TEST_CASE("far training: the end's save can be left out", "[trainer]") {
  Job job(true);
  job.config().checkpoint.at_end = false;
  const TempFolder some, none;
  const Result saved = job.train(some.path(), 7, true);
  CHECK(starting_with(saved.lines, "saved") ==
        std::vector<std::string>{"saved 2: 1", "saved 4: 1", "saved 6: 1"});
  CHECK(saved.states.contains("step-00000006"));
  CHECK_FALSE(saved.states.contains("step-00000007"));
  // Where no save is to be expected, no snapshot's memory is taken.
  job.config().checkpoint.every = 0;
  job.set_far([] { return std::make_unique<NoSnapshot>(); });
  CHECK(starting_with(job.train(none.path(), 3, true).lines, "saved").empty());
}

TEST_CASE("far training: a snapshot's memory that cannot be had ends the run with a sentence",
          "[trainer]") {
  Job job(true);
  const TempFolder folder;
  job.set_far([] { return std::make_unique<NoSnapshot>(); });
  CHECK_THROWS_WITH(job.train(folder.path(), 7, true), "no memory for a snapshot");
}

TEST_CASE("far training: a step's time is the device's, after saves and evaluations as well",
          "[trainer]") {
  // Where an operation takes a second of its stream and nothing else takes any.
  const bool is_cpu = GENERATE(true, false);
  Job job(GENERATE(true, false));
  job.config().train.global_batch = 10;  // of which the device is given two micro-batches ahead
  job.set_far([=] { return std::make_unique<SimulatedBackend>(is_cpu); });
  const TempFolder folder;
  const std::vector<StepRecord> steps = job.train(folder.path(), 7, true).steps;
  REQUIRE(steps.size() == 7);
  for (const StepRecord& step : steps) {
    CAPTURE(is_cpu, step.step);
    CHECK(step.step_ms == steps[0].step_ms);
    CHECK(step.tokens_per_s * step.step_ms == Approx(1e3 * 10 * 32));
    CHECK(step.phases.optimizer_ms == steps[0].phases.optimizer_ms);
    CHECK(step.phases.optimizer_ms >= 1e3);
    CHECK(step.phases.forward_backward_ms >= 5 * 1e3 - step.phases.data_ms);
  }
}

TEST_CASE("far training: a run that diverges at once fails, however short it is", "[trainer]") {
  // The first step leaves parameters that no gradient is finite at. On the far side the last result
  // comes after the last step.
  Job job(true);
  job.config().optimizer.lr = 1e30;
  const bool far = GENERATE(false, true);
  CAPTURE(far);
  const TempFolder folder;
  CHECK_THROWS_WITH(job.train(folder.path(), 5, far),
                    Catch::Contains("4 steps in a row") && Catch::Contains("the last one step 5"));
  job.config().train.max_skipped_steps = 3;
  const TempFolder other;
  CHECK_THROWS_WITH(job.train(other.path(), 50, far),
                    Catch::Contains("3 steps in a row") && Catch::Contains("the last one step 4"));
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
  const auto far = [](auto...) { return std::make_unique<FarBackend>(); };
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
