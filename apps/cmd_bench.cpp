// bench step: how long a whole training step takes, beside the memory plan and, on a CPU, its
// matrix products alone. bench ops: how long each operation takes in a step, beside what the device
// reaches on plain work. bench comm: how long ranks take to exchange data.
#include <fmt/format.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>

#include "apps/assemble.h"
#include "apps/comm_bench.h"
#include "apps/commands.h"
#include "apps/job_agreement.h"
#include "apps/launch_machine.h"
#include "apps/launcher.h"
#include "apps/rank_environment.h"
#include "apps/step_bench.h"
#include "apps/step_report.h"
#include "core/backend/cpu_backend.h"
#include "core/backend/matmul_bench.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/config/field_tree.h"
#include "core/config/hf_config.h"
#include "core/config/layout.h"
#include "core/config/validate.h"
#include "parallel/mpi_session.h"
#include "parallel/nccl_communicator.h"

namespace dstrain {
namespace {

// Every key of `model` as a Hugging Face config.json has it, which is read as by model.from.
std::vector<Override> hf_model_keys(nlohmann::json json, const std::string& path) {
  json.erase("quantization_config");  // of weights, which are not read here
  Config config;
  config.model = parse_hf_config(json.dump(), path);
  std::vector<Override> keys;
  for_each_leaf(*find_field(describe(config), "model"), [&](const FieldNode& leaf) {
    const bool is_source = leaf.name == "from" || leaf.name == "preset";
    if (!is_source) keys.push_back({leaf.path, leaf.value, path + ": " + leaf.name});
  });
  return keys;
}

// The model in a JSON file: a Hugging Face config.json, or an object with keys of `model`.
std::vector<Override> model_keys(const std::string& path) {
  const std::string text = read_small_file(path, kMaxHfConfigBytes);
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
  if (!json.is_object()) throw DataError(path + ": is not a JSON object of model keys");
  if (json.contains("model_type")) return hf_model_keys(json, path);
  std::vector<Override> keys;
  for (const auto& [key, value] : json.items())
    keys.push_back({"model." + key, value.is_string() ? value.get<std::string>() : value.dump(),
                    path + ": " + key});
  return keys;
}

using RunOnRank = std::function<void(const Config& config, const JobRanks& ranks)>;

int start_ranks(const std::vector<HostRanks>& hosts, const BenchOptions& options) {
  LaunchJob job;
  job.plan.hosts = hosts;
  job.plan.mpirun = find_mpirun(std::getenv, options.words.front() + " " + options.words[1]);
  job.plan.machine = look_at_machine(std::getenv);
  job.plan.program = program_path();
  job.words = options.words;
  job.temporary_folders.back() = temporary_folder(std::getenv);
  return run_launcher(job);
}

// Calls `run` as the only rank, or as the one that mpirun has started; or starts the ranks that the
// job asks for, which come here again.
int on_ranks(Config config, const BenchOptions& options, const RunOnRank& run) {
  const std::optional<RankEnvironment> launched = rank_environment(std::getenv);
  const std::vector<HostRanks> hosts = ranks_to_start(config, /*gpus=*/1);
  if (launch_mode(launched, hosts) == LaunchMode::launcher) return start_ranks(hosts, options);
  if (!launched || launched->size == 1) {
    run(config, {});
    return 0;
  }
  config.run.threads = threads_per_rank(config.run.threads, *launched, available_cores());
  MpiOptions mpi;
  mpi.expected_ranks = static_cast<int>(launched->size);
  MpiSession session(mpi);
  session.run([&](Communicator& world) {
    require_same_job(world, machine_name(), config);
    run(config, {.world = &world, .place = *launched, .machine = machine_name()});
  });
  session.finalize();
  return 0;
}

int64_t ranks_of_job(const Config& config) {
  const std::optional<RankEnvironment> launched = rank_environment(std::getenv);
  return launched ? launched->size : total_ranks(ranks_to_start(config, /*gpus=*/1));
}

Config bench_config(const BenchOptions& options) {
  ConfigSource source = options.config;
  auto set = [&](const char* key, const std::optional<int64_t>& value, const char* flag) {
    if (value) source.overrides.push_back({key, std::to_string(*value), flag});
  };
  if (!options.model_config.empty()) {  // below what --set says
    for (const char* key : {"model.preset", "model.from"})
      if (std::ranges::find(source.overrides, key, &Override::key) != source.overrides.end())
        throw UsageError(fmt::format(
            "--model-config and --set {} both name a whole model: give one of them", key));
    const std::vector<Override> model = model_keys(options.model_config);
    source.overrides.insert(source.overrides.begin(), model.begin(), model.end());
  }
  if (options.batch && options.accumulation)
    throw UsageError("--batch and --accumulation say the same in two ways: give one of them");
  set("data.seq_len", options.seq, "--seq");
  set("run.threads", options.threads, "--threads");
  const Config given = load_config(source).config;
  const int64_t ranks = ranks_of_job(given);
  const std::optional<MeshShape> mesh = mesh_over(given.parallel, ranks);
  const int64_t data = mesh ? mesh->data : 1;  // what does not fit is refused by validate()
  std::optional<int64_t> micro_batch = options.micro_batch, batch = options.batch;
  if (!micro_batch && options.batch) micro_batch = std::max<int64_t>(1, *options.batch / data);
  if (!micro_batch && options.accumulation) micro_batch = 1;
  if (!batch && micro_batch) batch = options.accumulation.value_or(1) * *micro_batch * data;
  set("train.global_batch", batch, "--batch");
  set("train.micro_batch", micro_batch, "--micro-batch");
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

// As validate() does, for any number of ranks: no layout and no batch has to fit them.
void validate_ranks_alone(LoadedConfig loaded) {
  Config& config = loaded.config;
  config.parallel = {};
  config.train.micro_batch = 1;
  config.train.global_batch = data_parallel_ranks(config);
  validate(loaded, Purpose::inspect);
}

// So that no row of the table is missing without a word.
void require_elements(const std::vector<int64_t>& sizes, int ranks) {
  const int64_t least = ranks * static_cast<int64_t>(sizeof(float));
  for (const int64_t size : sizes)
    if (size < least)
      throw UsageError(fmt::format(
          "--sizes: {} are too few for {} ranks, which exchange an element each; give {} or more",
          format_plural(size, "byte"), ranks, least));
}

void bench_comm_as_rank(const Config& config, const JobRanks& ranks, const BenchOptions& options) {
  if (!ranks.world)
    throw UsageError(
        "bench comm needs two ranks or more: add --set launch.ranks=2, or start it with mpirun");
  Communicator& world = *ranks.world;
  const std::vector<int64_t> chosen =
      options.sizes.empty() ? std::vector<int64_t>() : parse_sizes(options.sizes, "--sizes");
  require_elements(chosen, world.size());
  const std::unique_ptr<Backend> backend = make_backend(config, ranks.place);
  const auto device_ranks = make_device_ranks(config, world, ranks.machine, *backend);
  const bool on_gpus = device_ranks != nullptr;
  const std::vector<CommTiming> timings = bench_comm(
      on_gpus ? *device_ranks : world, *backend, chosen.empty() ? default_sizes(on_gpus) : chosen);
  if (!ranks.place.is_first()) return;
  const std::string device =
      fmt::format("{}, {}", backend->describe(), on_gpus ? "NCCL " + nccl_version() : "Open MPI");
  const std::string text =
      options.json ? comm_json(timings, world.size(), device)
                   : fmt::format("{} ranks, each {}\n", world.size(), device) + comm_table(timings);
  std::printf("%s", text.c_str());
}

}  // namespace

int cmd_bench_step(const BenchOptions& options) {
  const Config config = bench_config(options);
  const auto run = [&options](const Config& job, const JobRanks& ranks) {
    if (!options.synthetic && !job.data.train.empty() && ranks.place.is_first())
      log_info("bench step uses random tokens; data.train is not read");
    const StepBenchResult r = bench_step(job,
                                         {.steps = std::max<int64_t>(1, options.steps),
                                          .warm_up = options.warm_up,
                                          .documents = options.documents,
                                          .profiled_steps = options.profile ? 1 : 0},
                                         ranks);
    if (!ranks.place.is_first()) return;
    StepReport report(job, r);
    if (!r.on_gpu && r.ranks == 1) report.add_products(time_products_of_step(job));
    const std::string text = options.json ? report.json() + "\n" : report.text();
    std::printf("%s", text.c_str());
  };
  return on_ranks(config, options, run);
}

int cmd_bench_ops(const BenchOptions& options) {
  const Config config = bench_config(options);
  const auto run = [&options](const Config& job, const JobRanks& ranks) {
    const StepBenchResult r = bench_step(job,
                                         {.steps = 1,
                                          .warm_up = options.warm_up,
                                          .documents = options.documents,
                                          .profiled_steps = options.steps},
                                         ranks);
    if (!ranks.place.is_first()) return;
    const StepReport report(job, r);
    const std::string text = options.json
                                 ? report.operations_json(options.filter)
                                 : report.heading() + "\n" + report.operations_text(options.filter);
    std::printf("%s", text.c_str());
  };
  return on_ranks(config, options, run);
}

int cmd_bench_comm(const BenchOptions& options) {
  if (!options.sizes.empty()) parse_sizes(options.sizes, "--sizes");
  const LoadedConfig loaded = load_config(options.config);
  validate_ranks_alone(loaded);
  Config config = loaded.config;
  if (options.threads) config.run.threads = *options.threads;
  return on_ranks(config, options, [&options](const Config& job, const JobRanks& ranks) {
    bench_comm_as_rank(job, ranks, options);
  });
}

}  // namespace dstrain
