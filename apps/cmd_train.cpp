// deepseek-train --config job.yaml: checks, start-up table, training.
#include <cstdio>
#include <cstdlib>

#include "apps/commands.h"
#include "apps/signals.h"
#include "apps/startup_info.h"
#include "apps/trainer.h"
#include "core/base/log.h"
#include "core/config/validate.h"
#include "core/metrics/console_sink.h"
#include "core/metrics/report.h"

namespace dstrain {
namespace {

// The plan without the run: what would be used, and what this build cannot do.
int dry_run(const LoadedConfig& loaded, const std::vector<Unavailable>& missing, bool color) {
  Config config = loaded.config;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<TrainEngine> engine;
  if (config.model.vocab_size > 0 && missing.empty()) {
    backend = make_backend(config);
    engine = std::make_unique<TrainEngine>(*backend, config.model, engine_options(config, true));
  }
  StartupInfo info = startup_info_of(config, engine.get());
  info.dry_run = true;
  info.device = config.run.device == Device::cuda ? "cuda" : "cpu";
  for (const DataSourceConfig& source : config.data.train)
    info.data.push_back({"train", source.path, {}, {}, source.weight});
  std::printf("%s", loaded.resolved_yaml().c_str());
  std::printf("\n%s", startup_table(info, color).c_str());
  for (const Unavailable& feature : missing)
    std::printf("not available: %s: %s (%s)\n", feature.key.c_str(), feature.value.c_str(),
                feature.sentence.c_str());
  return 0;
}

}  // namespace

int cmd_train(const TrainOptions& options) {
  if (options.resume && options.resume->empty())
    throw UsageError("--resume is empty; give latest, none, or the path of a run or a checkpoint");
  LoadedConfig loaded = load_config(options.config);
  const char* term = std::getenv("TERM");
  const bool color = decide_color(options.color, 2, std::getenv("NO_COLOR"), term);
  const std::vector<Unavailable> missing = unavailable_features(loaded.config, build_capabilities());
  init_log({.level = options.quiet ? LogLevel::warning : LogLevel::info, .color = color,
            .json = options.log_json});
  if (options.dry_run) {
    validate(loaded, Purpose::inspect);
    return dry_run(loaded, missing, decide_color(options.color, 1, std::getenv("NO_COLOR"), term));
  }
  require_available(missing);
  validate(loaded, Purpose::train);
  for (const std::string& warning : config_warnings(loaded.config)) log_warning("{}", warning);
  resolve_vocab_size(loaded.config);
  handle_signals();

  const ConsoleMode mode = decide_console_mode(options.quiet, options.log_json, 2, term);
  LiveLine line(2, mode == ConsoleMode::live);
  MetricsHub hub;
  hub.add(std::make_unique<ConsoleSink>(
      line, ConsoleOptions{.mode = mode, .color = color, .log_every = loaded.config.train.log_every}));
  Trainer trainer(loaded.config, {options.resume.value_or(""), options.overwrite}, hub);
  return static_cast<int>(trainer.run());
}

}  // namespace dstrain
