// bench step: how long a whole training step takes, beside its matrix products alone and the memory
// plan.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "apps/evaluation.h"
#include "core/backend/cpu_backend.h"
#include "core/backend/matmul_bench.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/base/rng.h"
#include "core/config/validate.h"
#include "core/model/cost.h"

namespace dstrain {
namespace {

using Clock = std::chrono::steady_clock;

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
  set("train.global_batch", options.batch, "--batch");
  set("train.micro_batch", options.micro_batch ? options.micro_batch : options.batch,
      "--micro-batch");
  set("data.seq_len", options.seq, "--seq");
  set("run.threads", options.threads, "--threads");
  LoadedConfig loaded = load_config(source);
  require_available(unavailable_features(loaded.config, build_capabilities()));
  validate(loaded, Purpose::inspect);
  resolve_vocab_size(loaded.config);
  return loaded.config;
}

// Random tokens, one document per sequence.
struct SyntheticBatch {
  SyntheticBatch(const Config& config, uint64_t index) {
    const int64_t B = config.train.micro_batch, S = config.data.seq_len;
    for (int64_t t = 0; t < B * S; ++t) {
      const auto token = [&](uint64_t stream) {
        const uint64_t r = random_u64(7, stream + 2 * index, static_cast<uint64_t>(t));
        return static_cast<int32_t>(r % static_cast<uint64_t>(config.model.vocab_size));
      };
      tokens.push_back(token(0));
      targets.push_back(token(1));
      positions.push_back(static_cast<int32_t>(t % S));
    }
    for (int64_t b = 0; b <= B; ++b) offsets.push_back(static_cast<int32_t>(b * S));
    batch = {B, S, tokens.data(), positions.data(), targets.data(), offsets.data(), B};
  }
  std::vector<int32_t> tokens, targets, positions, offsets;
  HostBatch batch;
};

int64_t private_memory_bytes() {
  std::ifstream file("/proc/self/status");
  for (std::string key, rest; file >> key; std::getline(file, rest)) {
    int64_t kib = 0;
    if (key == "RssAnon:" && file >> kib) return kib * 1024;
  }
  return 0;
}

struct BenchResult {
  std::vector<double> step_seconds;  // sorted
  double products_seconds = 0;
  double flops = 0;  // of a step
  double loss = 0;
  int64_t plan_bytes = 0, private_before = 0, private_after = 0;
};

BenchResult run_bench(const Config& config, int64_t steps) {
  BenchResult result;
  result.private_before = private_memory_bytes();
  const int threads =
      static_cast<int>(config.run.threads > 0 ? config.run.threads : available_cores());
  const std::unique_ptr<Backend> backend = make_cpu_backend(threads);
  TrainEngine engine(*backend, config.model, engine_options(config, true));
  engine.allocate();
  engine.initialize(static_cast<uint64_t>(config.run.seed));
  result.plan_bytes = engine.memory_bytes();
  const int64_t micro_batches = config.train.global_batch / config.train.micro_batch;
  constexpr int64_t kWarmUp = 2;
  for (int64_t s = 0; s < kWarmUp + steps; ++s) {
    const SyntheticBatch synthetic(config, static_cast<uint64_t>(s));
    const Clock::time_point begin = Clock::now();
    engine.begin_step(3e-4,
                      micro_batches * engine.options().micro_batch * engine.options().seq_len);
    for (int64_t m = 0; m < micro_batches; ++m) engine.accumulate(synthetic.batch);
    engine.finish_step();
    result.loss = engine.take_result().loss;
    if (s >= kWarmUp)
      result.step_seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
  }
  result.private_after = private_memory_bytes();
  std::sort(result.step_seconds.begin(), result.step_seconds.end());
  result.flops = model_cost(config.model, config.data.seq_len).flops_per_token *
                 static_cast<double>(config.train.global_batch * config.data.seq_len);
  return result;
}

// The products that one step makes, from a run whose back end writes them down.
std::vector<ProductShape> products_of_step(const Config& config) {
  MatmulLog log;
  const std::unique_ptr<Backend> backend =
      make_cpu_backend(static_cast<int>(config.run.threads), &log);
  TrainEngine engine(*backend, config.model, engine_options(config, true));
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

}  // namespace

int cmd_bench_step(const BenchOptions& options) {
  const Config config = bench_config(options);
  if (!options.synthetic && !config.data.train.empty())
    log_info("bench step uses random tokens; data.train is not read");
  BenchResult r = run_bench(config, std::max<int64_t>(1, options.steps));
  const std::vector<ProductShape> products = products_of_step(config);
  const int threads =
      static_cast<int>(config.run.threads > 0 ? config.run.threads : available_cores());
  r.products_seconds = time_products(products, threads, 5);

  const double step = r.step_seconds[r.step_seconds.size() / 2];
  const double tokens = static_cast<double>(config.train.global_batch * config.data.seq_len);
  const int64_t used = r.private_after - r.private_before;
  const double parameters =
      static_cast<double>(model_cost(config.model, config.data.seq_len).parameters_total);
  if (options.json) {
    nlohmann::ordered_json json = {{"program", "deepseek-train cpu"},
                                   {"params_m", parameters / 1e6},
                                   {"threads", threads},
                                   {"batch", config.train.global_batch},
                                   {"seq", config.data.seq_len},
                                   {"step_ms", 1e3 * step},
                                   {"step_ms_fastest", 1e3 * r.step_seconds.front()},
                                   {"tokens_per_s", tokens / step},
                                   {"gflop_per_s", 1e-9 * r.flops / step},
                                   {"loss", r.loss},
                                   {"products_ms", 1e3 * r.products_seconds},
                                   {"step_over_products", step / r.products_seconds},
                                   {"plan_bytes", r.plan_bytes},
                                   {"private_bytes", used}};
    std::printf("%s\n", json.dump().c_str());
    return 0;
  }
  std::printf("%s parameters, %lld x %lld tokens, %d threads, %s\n",
              format_count(parameters).c_str(), static_cast<long long>(config.train.global_batch),
              static_cast<long long>(config.data.seq_len), threads, matmul_library().c_str());
  std::printf("step            %8.1f ms   median of %zu (fastest %.1f)   %s tokens/s   %s/s\n",
              1e3 * step, r.step_seconds.size(), 1e3 * r.step_seconds.front(),
              format_count(tokens / step).c_str(), format_flops(r.flops / step).c_str());
  std::printf(
      "its products    %8.1f ms   %zu calls of the library alone; the step takes %.2f x that\n",
      1e3 * r.products_seconds, products.size(), step / r.products_seconds);
  std::printf("memory          %s planned, %s private after the steps\n",
              format_bytes(r.plan_bytes).c_str(), format_bytes(used).c_str());
  return 0;
}

int cmd_bench_ops(const BenchOptions&) {
  throw ConfigError("bench ops is not available in this build; bench step prints the whole step");
}

}  // namespace dstrain
