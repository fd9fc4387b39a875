// deepseek-train --config job.yaml: checks, start-up table, training.
#include <fmt/format.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "apps/dry_run.h"
#include "apps/job_agreement.h"
#include "apps/launch_training.h"
#include "apps/rank_environment.h"
#include "apps/rank_process.h"
#include "apps/signals.h"
#include "apps/trainer.h"
#include "core/backend/cpu_backend.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/config/validate.h"
#include "core/metrics/console_sink.h"
#include "parallel/mpi_session.h"

namespace dstrain {
namespace {

// One rank of several, started by mpirun or srun. Signals are handled already: MPI's threads
// inherit the mask.
int train_as_rank(Config config, const TrainerOptions& options, MetricsHub& hub,
                  const RankEnvironment& ranks) {
  config.run.threads = threads_per_rank(config.run.threads, ranks, available_cores());
  RankProcess process(ranks, static_cast<double>(config.launch.hang_timeout), std::getenv);
  MpiOptions mpi;
  mpi.expected_ranks = static_cast<int>(ranks.size);
  // The watchdog notices a hang first, and says where.
  mpi.timeout = config.launch.hang_timeout > 0
                    ? std::chrono::seconds(2 * config.launch.hang_timeout)
                    : std::chrono::hours(24 * 365);
  MpiSession session(mpi);
  ExitCode code = ExitCode::ok;
  session.run([&](Communicator& world) {
    require_same_job(world, machine_name(), config);
    Trainer trainer(config, options, hub, {&world, ranks, machine_name(), &process.progress()});
    code = trainer.run();
  });
  session.finalize();
  return static_cast<int>(code);
}

// Every rank reads it, and again when the job is started again: a pipe gives its text once.
void require_file(const std::optional<std::string>& job) {
  std::error_code error;
  if (job && !std::filesystem::is_regular_file(*job, error))
    throw UsageError(
        fmt::format("'{}' is no regular file, and each rank of a job reads its job file itself; "
                    "write it to one",
                    *job));
}

}  // namespace

int cmd_train(const TrainOptions& options) {
  if (options.resume && options.resume->empty())
    throw UsageError("--resume is empty; give latest, none, or the path of a run or a checkpoint");
  LoadedConfig loaded = load_config(options.config);
  const std::optional<RankEnvironment> launched = rank_environment(std::getenv);
  const RankEnvironment ranks = launched.value_or(RankEnvironment{});
  const char* term = std::getenv("TERM");
  const bool color = decide_color(options.color, 2, std::getenv("NO_COLOR"), term);
  const std::vector<Unavailable> missing =
      unavailable_features(loaded.config, build_capabilities());
  init_log(log_options_of(ranks, {.level = options.quiet ? LogLevel::warning : LogLevel::info,
                                  .color = color,
                                  .json = options.log_json}));
  if (options.dry_run)
    return dry_run(loaded, options, missing,
                   decide_color(options.color, 1, std::getenv("NO_COLOR"), term), launched);
  require_available(missing);
  validate(loaded, Purpose::train);
  hold_signals();  // looking for GPUs starts threads; before the first line, as it may start again
  if (ranks.is_first() && !ranks.is_supervised)
    for (const std::string& warning : config_warnings(loaded.config)) log_warning("{}", warning);
  ConsoleMode mode = decide_console_mode(options.quiet, options.log_json, 2, term);
  const std::vector<HostRanks> hosts = ranks_to_start(loaded.config, gpus_for_ranks());
  // Before any rank starts, so that the user hears it once.
  const JobSize size = launched ? JobSize{ranks.size, ranks.local_size}
                                : JobSize{total_ranks(hosts), most_ranks_of_host(hosts)};
  const DeviceChoice device = choose_device(loaded.config, size, visible_gpus_here());
  if (launched && !ranks.is_supervised && ranks.is_first() && !loaded.config.launch.ranks.is_auto() &&
      loaded.config.launch.ranks.value != ranks.size)
    log_warning("launch.ranks: {} is not followed: this job was started from outside with {}",
                loaded.config.launch.ranks.value, format_plural(ranks.size, "rank"));
  if (!device.note.empty() && ranks.is_first() && !ranks.is_supervised) log_info("{}", device.note);
  if (launch_mode(launched, hosts) == LaunchMode::launcher) {
    require_file(options.config.path);
    return launch_training(loaded.config, hosts, options.words,
                           {.color = color, .live = mode == ConsoleMode::live}, std::getenv);
  }

  resolve_vocab_size(loaded.config);
  handle_signals();
  const std::optional<int> columns = launcher_columns(std::getenv);
  if (columns && mode == ConsoleMode::lines) mode = ConsoleMode::live;
  LiveLine line(2, mode == ConsoleMode::live, columns.value_or(0));
  MetricsHub hub;
  if (ranks.is_first())
    hub.add(std::make_unique<ConsoleSink>(
        line,
        ConsoleOptions{.mode = mode, .color = color, .log_every = loaded.config.train.log_every}));
  const TrainerOptions start{
      .resume = options.resume.value_or(""), .overwrite = options.overwrite, .make_backend = {}};
  if (launched) return train_as_rank(loaded.config, start, hub, *launched);
  Trainer trainer(loaded.config, start, hub);
  return static_cast<int>(trainer.run());
}

}  // namespace dstrain
