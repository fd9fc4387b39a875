#include "apps/dry_run.h"

#include <fmt/format.h>

#include "apps/assemble.h"
#include "apps/run_folder.h"
#include "apps/startup_info.h"
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
    CheckpointStore store(paths.checkpoints, config.checkpoint.keep);
    const auto checkpoint =
        choose_checkpoint(paths, store, options.resume.value_or(""), options.overwrite);
    if (!checkpoint) return;
    info.resume = checkpoint->path;
    info.resume_step = checkpoint->manifest.meta.step;
  });
}

}  // namespace

int dry_run(const LoadedConfig& loaded, const TrainOptions& options,
            const std::vector<Unavailable>& missing, bool color) {
  validate(loaded, Purpose::inspect);
  Config config = loaded.config;
  passes([&] { validate(loaded, Purpose::train); });
  for (const std::string& warning : config_warnings(config)) log_warning("{}", warning);
  const bool has_tokenizer = check_tokenizer(config);
  if (!config.model.from.empty()) passes([&] { HfWeights weights(config.model.from); });

  std::unique_ptr<Backend> backend;
  std::unique_ptr<TrainEngine> engine;
  if (config.model.vocab_size > 0 && missing.empty()) {
    backend = make_backend(config);
    engine = std::make_unique<TrainEngine>(*backend, config.model, engine_options(config, true));
  }
  StartupInfo info = startup_info_of(config, engine.get());
  info.dry_run = true;
  add_data(info, config, has_tokenizer ? config.data.tokenizer : "");
  if (engine) passes([&] { require_memory(info.memory_total_bytes()); });
  if (!config.run.name.empty()) check_folder(info, config, options);

  fmt::print("{}\n{}", loaded.resolved_yaml(), startup_table(info, color));
  for (const Unavailable& feature : missing)
    fmt::print("not available: {}: {} ({})\n", feature.key, feature.value, feature.sentence);
  return static_cast<int>(ExitCode::ok);
}

}  // namespace dstrain
