// bench step: how long a whole training step takes, beside the memory plan and, on a CPU, its
// matrix products alone. bench ops: how long each operation takes in a step, beside what the device
// reaches on plain work.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "apps/step_bench.h"
#include "apps/step_report.h"
#include "core/backend/cpu_backend.h"
#include "core/backend/matmul_bench.h"
#include "core/base/log.h"
#include "core/config/validate.h"

namespace dstrain {
namespace {

// Keys of `model` as JSON, for example a Hugging Face config.json without its housekeeping keys.
void apply_model_json(const std::string& path, std::vector<Override>& overrides) {
  const std::string text = read_small_file(path, int64_t{1} << 20);
  nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
  if (!json.is_object()) throw DataError(path + ": is not a JSON object of model keys");
  for (const auto& [key, value] : json.items())
    overrides.push_back({"model." + key,
                         value.is_string() ? value.get<std::string>() : value.dump(),
                         path + ": " + key});
}

Config bench_config(const BenchOptions& options) {
  ConfigSource source = options.config;
  auto set = [&](const char* key, const std::optional<int64_t>& value, const char* flag) {
    if (value) source.overrides.push_back({key, std::to_string(*value), flag});
  };
  if (!options.model_config.empty()) apply_model_json(options.model_config, source.overrides);
  if (options.batch && options.accumulation)
    throw UsageError("--batch and --accumulation say the same in two ways: give one of them");
  const std::optional<int64_t> micro_batch =
      options.micro_batch ? options.micro_batch : options.batch;
  std::optional<int64_t> batch = options.batch ? options.batch : micro_batch;
  if (options.accumulation) batch = *options.accumulation * micro_batch.value_or(1);
  set("train.global_batch", batch, "--batch");
  set("train.micro_batch", micro_batch || !options.accumulation ? micro_batch : 1, "--micro-batch");
  set("data.seq_len", options.seq, "--seq");
  set("run.threads", options.threads, "--threads");
  LoadedConfig loaded = load_config(source);
  require_available(unavailable_features(loaded.config, build_capabilities()));
  validate(loaded, Purpose::inspect);
  resolve_vocab_size(loaded.config);
  return loaded.config;
}

// The products that one step makes, from a run whose back end writes them down.
std::vector<ProductShape> products_of_step(const Config& config) {
  MatmulLog log;
  const std::unique_ptr<Backend> backend =
      make_cpu_backend(static_cast<int>(config.run.threads), &log);
  TrainEngine engine(*backend, config.model, engine_options(config, true, *backend));
  engine.allocate();
  engine.initialize(static_cast<uint64_t>(config.run.seed));
  const SyntheticBatch synthetic(config, 0);
  engine.begin_step(0.0, 1);
  const int64_t micro_batches = config.train.global_batch / config.train.micro_batch;
  for (int64_t m = 0; m < micro_batches; ++m) engine.accumulate(synthetic.batch);
  engine.finish_step();
  engine.take_result();
  return log.take();
}

ProductsTime time_products_of_step(const Config& config) {
  const std::vector<ProductShape> products = products_of_step(config);
  const int threads =
      static_cast<int>(config.run.threads > 0 ? config.run.threads : available_cores());
  return {time_products(products, threads, 5), std::ssize(products)};
}

}  // namespace

int cmd_bench_step(const BenchOptions& options) {
  const Config config = bench_config(options);
  if (!options.synthetic && !config.data.train.empty())
    log_info("bench step uses random tokens; data.train is not read");
  const StepBenchResult r = bench_step(config, {.steps = std::max<int64_t>(1, options.steps),
                                                .warm_up = options.warm_up,
                                                .documents = options.documents,
                                                .profiled_steps = options.profile ? 1 : 0});
  StepReport report(config, r);
  if (!report.on_gpu()) report.add_products(time_products_of_step(config));
  if (options.json)
    std::printf("%s\n", report.json().c_str());
  else
    std::printf("%s", report.text().c_str());
  return 0;
}

int cmd_bench_ops(const BenchOptions& options) {
  const Config config = bench_config(options);
  const StepBenchResult r = bench_step(config, {.steps = 1,
                                                .warm_up = options.warm_up,
                                                .documents = options.documents,
                                                .profiled_steps = options.steps});
  const StepReport report(config, r);
  const std::string out = options.json
                              ? report.operations_json(options.filter)
                              : report.heading() + "\n" + report.operations_text(options.filter);
  std::printf("%s", out.c_str());
  return 0;
}

}  // namespace dstrain
