#include "apps/step_bench.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <memory>
#include <set>
#include <sstream>
#include <utility>

#include "apps/assemble.h"
#include "core/base/rng.h"
#include "core/model/cost.h"

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

class StepRunner {
 public:
  StepRunner(const Config& config, TrainEngine& engine, int64_t documents) : engine_(engine) {
    micro_batches_ = config.train.global_batch / config.train.micro_batch;
    for (uint64_t i = 0; i < 8; ++i) batches_.emplace_back(config, i, documents);
  }

  void queue_step() {
    begin();
    for (int64_t m = 0; m < micro_batches_; ++m) queue_micro_batch(m);
    engine_.finish_step();
  }
  void begin() {
    engine_.begin_step(3e-4,
                       micro_batches_ * engine_.options().micro_batch * engine_.options().seq_len);
  }
  void queue_micro_batch(int64_t m) {
    engine_.accumulate(batches_[static_cast<size_t>(next_++ % 8)].batch, m + 1 == micro_batches_);
  }
  int64_t micro_batches() const { return micro_batches_; }

 private:
  TrainEngine& engine_;
  int64_t micro_batches_ = 1, next_ = 0;
  std::vector<SyntheticBatch> batches_;
};

// Of a device that works while the host goes on: what queueing a step's calls takes, measured where
// the queue is empty, since a full one makes the host wait.
double host_seconds(TrainEngine& engine, StepRunner& runner) {
  double seconds = 0;
  runner.begin();
  for (int64_t m = 0; m < runner.micro_batches(); ++m) {
    engine.stream().synchronize();
    const Clock::time_point begin = Clock::now();
    runner.queue_micro_batch(m);
    seconds += seconds_since(begin);
  }
  engine.stream().synchronize();
  const Clock::time_point begin = Clock::now();
  engine.finish_step();
  seconds += seconds_since(begin);
  engine.take_result();
  return seconds;
}

std::map<std::string, OpTotal> profile_steps(int64_t steps, TrainEngine& engine, StepRunner& runner,
                                             TimedOps& ops) {
  std::map<std::string, std::vector<OpTotal>> all;
  ops.take_totals();
  for (int64_t s = 0; s < steps; ++s) {
    runner.queue_step();
    engine.take_result();
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

StepBenchResult bench_step(const Config& config, const StepBenchOptions& options) {
  StepBenchResult result;
  result.private_before = private_memory_bytes();
  result.recompute = std::string(enum_name(config.train.recompute));
  std::unique_ptr<Backend> backend = make_backend(config);
  const std::unique_ptr<OpClock> clock = make_op_clock(*backend);
  TimedBackend* timed = nullptr;
  const EngineOptions engine_settings = engine_options(config, true, *backend);
  if (options.profiled_steps > 0) {
    result.ceilings = measure_ceilings(*backend, engine_settings.dtype);
    auto wrapped = std::make_unique<TimedBackend>(std::move(backend), make_op_clock(*backend));
    timed = wrapped.get();
    backend = std::move(wrapped);
  }
  result.device = backend->describe();
  result.on_gpu = !backend->is_cpu();
  result.precision = precision_name(config, engine_settings);
  TrainEngine engine(*backend, config.model, engine_settings);
  engine.allocate();
  engine.initialize(static_cast<uint64_t>(config.run.seed));
  result.plan_bytes = engine.memory_bytes();
  StepRunner runner(config, engine, options.documents);

  // Results are taken a step late, as the trainer does: the device always has work queued.
  std::vector<int> ends{clock->mark(engine.stream())};
  const auto take = [&](int64_t step) {
    result.loss = engine.take_result().loss;
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

  result.host_seconds =
      backend->is_cpu() ? result.step_seconds.front() : host_seconds(engine, runner);
  if (timed)
    result.profile = profile_steps(options.profiled_steps, engine, runner, timed->timed_ops());
  result.private_after = private_memory_bytes();
  std::sort(result.step_seconds.begin(), result.step_seconds.end());
  result.flops = model_cost(config.model, config.data.seq_len).flops_per_token *
                 static_cast<double>(config.train.global_batch * config.data.seq_len);
  return result;
}

}  // namespace dstrain
