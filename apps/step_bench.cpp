#include "apps/step_bench.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <memory>
#include <set>
#include <sstream>
#include <utility>

#include "apps/assemble.h"
#include "core/base/rng.h"
#include "core/model/cost.h"
#include "parallel/rank_job.h"

namespace dstrain {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

int64_t private_memory_bytes() {
  std::ifstream file("/proc/self/status");
  for (std::string key, rest; file >> key; std::getline(file, rest)) {
    int64_t kib = 0;
    if (key == "RssAnon:" && file >> kib) return kib * 1024;
  }
  return 0;
}

// Seconds since the kernel started this process, in its ticks of 10 ms.
double process_age() {
  std::ifstream stat("/proc/self/stat"), uptime("/proc/uptime");
  std::string line;
  std::getline(stat, line);
  double now = 0;
  uptime >> now;
  std::istringstream fields(line.substr(std::min(line.size(), line.rfind(')') + 1)));
  std::string field;
  for (int i = 0; i < 20; ++i) fields >> field;  // the 22nd of all is the start
  return field.empty() ? 0 : now - std::stod(field) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

// Runs steps of a job on random tokens: the same for all ranks that share sequences.
class StepRunner {
 public:
  StepRunner(const Config& config, RankJob& job, int64_t documents)
      : job_(job),
        engine_(job.engine()),
        step_tokens_(config.train.global_batch * config.data.seq_len),
        micro_batches_(micro_batches_per_step(config, job.mesh().shape())) {
    const uint64_t first = kBatches * static_cast<uint64_t>(job.mesh().place().data.rank);
    for (uint64_t i = 0; i < kBatches; ++i) batches_.emplace_back(config, first + i, documents);
  }

  // before_micro_batch() is called before the host queues each, and once after the last.
  void queue_step(const std::function<void()>& before_micro_batch = [] {}) {
    job_.exposed().begin_step();
    job_.runner().run([&](int64_t m) {
      before_micro_batch();
      if (m == 0) engine_.begin_step(3e-4, step_tokens_);
      engine_.load(m, batches_[next_++ % kBatches].batch, m + 1 == micro_batches_);
    });
    before_micro_batch();
    engine_.finish_step();
    job_.exposed().end_step();
  }
  StepResult take_result() {
    const StepResult result = engine_.take_result();
    exposed_.push_back(job_.exposed().take());
    return result;
  }
  TrainEngine& engine() { return engine_; }
  const std::vector<ExposedRecord>& exposed() const { return exposed_; }

 private:
  static constexpr uint64_t kBatches = 8;
  RankJob& job_;
  TrainEngine& engine_;
  const int64_t step_tokens_, micro_batches_;
  uint64_t next_ = 0;
  std::vector<SyntheticBatch> batches_;
  std::vector<ExposedRecord> exposed_;  // of every step so far
};

// Of a device that works while the host goes on: what queueing a step's calls takes, measured where
// the queue is empty, since a full one makes the host wait.
double host_seconds(StepRunner& runner) {
  double seconds = 0;
  std::optional<Clock::time_point> begin;
  runner.queue_step([&] {
    if (begin) seconds += seconds_since(*begin);
    runner.engine().stream().synchronize();
    begin = Clock::now();
  });
  seconds += seconds_since(*begin);
  runner.take_result();
  return seconds;
}

std::map<std::string, OpTotal> profile_steps(int64_t steps, StepRunner& runner, TimedOps& ops) {
  std::map<std::string, std::vector<OpTotal>> all;
  ops.take_totals();
  for (int64_t s = 0; s < steps; ++s) {
    runner.queue_step();
    runner.take_result();
    for (auto& [name, total] : ops.take_totals()) all[name].push_back(total);
  }
  std::map<std::string, OpTotal> medians;
  for (auto& [name, totals] : all) {
    const auto middle = totals.begin() + std::ssize(totals) / 2;
    std::nth_element(totals.begin(), middle, totals.end(),
                     [](const OpTotal& a, const OpTotal& b) { return a.seconds < b.seconds; });
    medians[name] = *middle;
  }
  return medians;
}

}  // namespace

SyntheticBatch::SyntheticBatch(const Config& config, uint64_t index, int64_t documents) {
  const int64_t B = config.train.micro_batch, S = config.data.seq_len;
  const auto random = [index](uint64_t stream, int64_t at, int64_t range) {
    const uint64_t r = random_u64(7, stream + 3 * index, static_cast<uint64_t>(at));
    return static_cast<int32_t>(r % static_cast<uint64_t>(range));
  };
  for (int64_t t = 0; t < B * S; ++t) {
    tokens.push_back(random(0, t, config.model.vocab_size));
    targets.push_back(random(1, t, config.model.vocab_size));
  }
  std::set<int32_t> ends;
  for (int64_t b = 0; b <= B; ++b) ends.insert(static_cast<int32_t>(b * S));
  for (int64_t cut = 0; cut < B * (documents - 1); ++cut)
    ends.insert(static_cast<int32_t>(cut % B * S) + random(2, cut, S));
  offsets.assign(ends.begin(), ends.end());
  for (size_t i = 0; i + 1 < offsets.size(); ++i)
    for (int32_t t = offsets[i]; t < offsets[i + 1]; ++t) positions.push_back(t - offsets[i]);
  batch = {B,
           S,
           tokens.data(),
           positions.data(),
           targets.data(),
           offsets.data(),
           std::ssize(offsets) - 1};
}

StepBenchResult bench_step(const Config& config, const StepBenchOptions& options,
                           const JobRanks& ranks) {
  StepBenchResult result;
  result.private_before = private_memory_bytes();
  result.recompute = std::string(enum_name(config.train.recompute));
  std::unique_ptr<Backend> backend = make_backend(config, ranks.place);
  TimedBackend* timed = nullptr;
  if (options.profiled_steps > 0) {
    result.ceilings = measure_ceilings(*backend, engine_options(config, true, *backend).dtype);
    std::unique_ptr<OpClock> op_clock = backend->make_clock();
    auto wrapped = std::make_unique<TimedBackend>(std::move(backend), std::move(op_clock));
    timed = wrapped.get();
    backend = std::move(wrapped);
  }
  LocalCommunicator only_rank(*backend);
  Communicator& world = ranks.world ? *ranks.world : only_rank;
  const auto device_ranks = make_device_ranks(config, world, ranks.machine, *backend);
  result.ranks = world.size();
  result.mesh = resolve_mesh(config, world.size());
  RankJob job(config, result.mesh, device_ranks ? *device_ranks : world, *backend, ranks.machine,
              /*training=*/true);
  TrainEngine& engine = job.engine();
  result.device = backend->describe();
  result.on_gpu = !backend->is_cpu();
  result.precision = precision_name(config, engine.options());
  engine.allocate();
  engine.initialize(static_cast<uint64_t>(config.run.seed));
  result.plan_bytes = engine.memory_bytes();
  StepRunner runner(config, job, options.documents);

  // Results are taken a step late, as the trainer does: the device always has work queued.
  const std::unique_ptr<OpClock> clock = backend->make_clock();
  std::vector<int> ends{clock->mark(engine.stream())};
  const auto take = [&](int64_t step) {
    result.loss = runner.take_result().loss;
    if (step == 0) result.startup_seconds = process_age();
  };
  const int64_t steps = options.warm_up + options.steps;
  const int64_t late = backend->is_cpu() ? 0 : 1;
  for (int64_t s = 0; s < steps; ++s) {
    runner.queue_step();
    ends.push_back(clock->mark(engine.stream()));
    if (s >= late) take(s - late);
  }
  if (late == 1) take(steps - 1);
  for (size_t s = static_cast<size_t>(options.warm_up); s + 1 < ends.size(); ++s)
    result.step_seconds.push_back(clock->seconds_between(ends[s], ends[s + 1]));
  if (world.size() > 1) {
    ExposedRecord sum;
    for (size_t s = static_cast<size_t>(options.warm_up); s < runner.exposed().size(); ++s)
      sum += runner.exposed()[s];
    result.exposed = sum.mean_of(options.steps);
  }

  result.host_seconds = backend->is_cpu() ? result.step_seconds.front() : host_seconds(runner);
  if (timed) result.profile = profile_steps(options.profiled_steps, runner, timed->timed_ops());
  result.private_after = private_memory_bytes();
  std::sort(result.step_seconds.begin(), result.step_seconds.end());
  result.flops = model_cost(config.model, config.data.seq_len).flops_per_token *
                 static_cast<double>(config.train.global_batch * config.data.seq_len);
  return result;
}

}  // namespace dstrain
