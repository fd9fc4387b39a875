#include "apps/dry_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "apps/assemble.h"
#include "apps/launch_plan.h"
#include "apps/run_folder.h"
#include "apps/startup_info.h"
#include "core/backend/cpu_backend.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/checkpoint/hf_format.h"
#include "core/config/validate.h"
#include "core/metrics/report.h"

namespace dstrain {
namespace {

// False if a run would be refused by this check; the warning says so in the run's own words.
template <class Check>
bool passes(const Check& check) {
  try {
    check();
    return true;
  } catch (const Error& refusal) {
    log_warning("a run would be refused with exit code {}: {}", static_cast<int>(refusal.code()),
                refusal.what());
    return false;
  }
}

// Whether the file is one that the data can be checked against. Sets model.vocab_size where it is
// 0.
bool check_tokenizer(Config& config) {
  if (config.data.tokenizer.empty()) return false;
  return passes([&] {
    if (config.model.vocab_size == 0)
      resolve_vocab_size(config);
    else
      file_fingerprint(config.data.tokenizer);
  });
}

void add_data(StartupInfo& info, const Config& config, const std::string& tokenizer) {
  const auto add = [&](const char* split, const DataSourceConfig& source, bool is_training) {
    DataSet data;
    passes([&] {
      data = open_data({source}, tokenizer);
      if (config.model.vocab_size > 0) warn_of_vocabulary(data, config.model.vocab_size);
      PackOptions pack;
      pack.seq_len = config.data.seq_len;
      if (is_training) SampleOrder(data.sources, pack, /*single_pass=*/false, /*start=*/0, {});
    });
    info.data.push_back(
        data_row(split, source, data.datasets.empty() ? nullptr : &data.datasets[0]));
  };
  for (const DataSourceConfig& source : config.data.train) add("train", source, true);
  for (const DataSourceConfig& source : config.data.valid) add("valid", source, false);
  info.epochs = epochs_of(info);
}

void check_folder(StartupInfo& info, const Config& config, const TrainOptions& options) {
  const RunPaths paths(config);
  passes([&] {
    check_run_folder(paths.folder);
    check_checkpoints_folder(paths.folder);
    CheckpointStore store(paths.checkpoints, config.checkpoint.keep);
    const auto checkpoint =
        choose_checkpoint(paths, store, options.resume.value_or(""), options.overwrite);
    if (!checkpoint) return;
    info.resume = checkpoint->path;
    info.resume_step = checkpoint->manifest.meta.step;
  });
}

// What only an estimate says is no refusal.
void check_gpu_memory(const StartupInfo& info) {
  const int64_t planned = info.gpu_memory_bytes(),
                beside = info.communicators ? info.communicators->bytes : 0;
  const auto& free = info.gpu_available_bytes;
  const bool is_accepted = passes(
      [&] { require_gpu_memory(planned, free, largest_memory_part(info, /*on_gpu=*/true)); });
  if (is_accepted && free && planned + beside > *free)
    log_warning(
        "with what NCCL takes, by an estimate, a rank needs {} of GPU memory, and {} are free",
        format_bytes(planned + beside), format_bytes(*free));
}

int64_t bytes_of(const StartupInfo& info) {
  return info.gpu_memory_bytes() + info.host_memory_bytes();
}

// The plan of the rank that needs the most memory. Ranks of a pipeline stage need the same; first,
// last and middle stages differ in tables, layers and micro-batches in flight. As if on one
// machine.
StartupInfo plan_of_job(const Config& config, const MeshShape& shape, Backend& backend) {
  const int64_t stages = shape.pipeline;
  StartupInfo largest;
  for (const int64_t stage : std::set{int64_t{0}, stages / 2, stages - 1}) {
    const int64_t rank = stage * shape.stage_ranks();
    RankJob job(config, shape, static_cast<int>(rank), backend, /*training=*/true);
    StartupInfo info = startup_info_of(config, &job);
    if (stage > 0 && bytes_of(info) <= bytes_of(largest)) continue;
    largest = std::move(info);
    if (stages > 1)
      largest.memory_rank = fmt::format("rank {}, in stage {}, which needs the most", rank, stage);
  }
  if (config.compression.scope == CompressionScope::inter_node &&
      config.compression.method != CompressionMethod::none)
    log_warning(
        "the plan is for ranks on one machine: what compression between nodes takes is not in it");
  return largest;
}

// A rank on the machine that has the most of them.
RankEnvironment planned_rank(const Config& config, const MeshShape& shape,
                             const std::optional<RankEnvironment>& launched) {
  if (launched) return *launched;
  RankEnvironment rank;
  rank.size = shape.ranks();
  rank.local_size = most_ranks_of_host(ranks_to_start(config, gpus_for_ranks()));
  return rank;
}

MeshShape mesh_of_plan(const Config& config, const std::optional<RankEnvironment>& launched) {
  std::optional<MeshShape> shape;
  if (launched)
    passes([&] { shape = resolve_mesh(config, launched->size); });
  else
    shape = planned_mesh(config);
  return shape.value_or(smallest_mesh(config));
}

}  // namespace

int dry_run(const LoadedConfig& loaded, const TrainOptions& options,
            const std::vector<Unavailable>& missing, bool color,
            const std::optional<RankEnvironment>& launched) {
  if (launched && !launched->is_first()) return static_cast<int>(ExitCode::ok);
  validate(loaded, Purpose::inspect);
  Config config = loaded.config;
  passes([&] { validate(loaded, Purpose::train); });
  for (const std::string& warning : config_warnings(config)) log_warning("{}", warning);
  const bool has_tokenizer = check_tokenizer(config);
  if (!config.model.from.empty()) passes([&] { HfWeights weights(config.model.from); });

  const bool is_planned =
      config.model.vocab_size > 0 &&
      std::ranges::all_of(missing, [](const Unavailable& feature) { return feature.is_device; });
  StartupInfo info = startup_info_of(config, nullptr);
  RankEnvironment rank;
  if (is_planned) {
    const MeshShape shape = mesh_of_plan(config, launched);
    rank = planned_rank(config, shape, launched);
    config.run.threads = threads_per_rank(config.run.threads, rank, available_cores());
    const JobSize size{rank.size, rank.local_size};
    if (missing.empty()) passes([&] { choose_device(config, size, visible_gpus_here()); });
    std::string note;
    const std::unique_ptr<Backend> backend = make_planning_backend(config, size, note);
    if (!note.empty()) log_warning("{}", note);
    info = plan_of_job(config, shape, *backend);
  }
  info.dry_run = true;
  add_data(info, config, has_tokenizer ? config.data.tokenizer : "");
  if (is_planned) {
    passes([&] {
      require_memory(info.host_memory_bytes() * rank.local_size,
                     largest_memory_part(info, /*on_gpu=*/false));
    });
    check_gpu_memory(info);
  }
  if (!config.run.name.empty()) check_folder(info, config, options);

  fmt::print("{}\n{}", loaded.resolved_yaml(), startup_table(info, color));
  for (const Unavailable& feature : missing)
    fmt::print("not available: {}: {} ({})\n", feature.key, feature.value, feature.sentence);
  return static_cast<int>(ExitCode::ok);
}

}  // namespace dstrain
