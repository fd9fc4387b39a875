// deepseek-train --config job.yaml, and the options that every command with a job file has.
#include <algorithm>

#include "apps/cli_commands.h"
#include "apps/cli_config.h"
#include "core/base/error.h"

namespace dstrain {

std::vector<std::string> option_words(const ScannedLine& line) {
  std::vector<std::string> words;
  for (const GivenOption& option : line.options) {
    words.push_back(option.name);
    if (option.has_value) words.push_back(option.value);
  }
  return words;
}

void declare_config(Command command, bool with_aliases) {
  command.add_scanned("--config", "FILE", "job file; configs/quickstart.yaml is one");
  command.add_scanned("--set", "KEY=VALUE", "override one key of the job file; may be repeated",
                      /*is_repeatable=*/true);
  if (!with_aliases) return;
  for (const Alias& alias : config_aliases())
    command.add_scanned(alias.option, alias.type, alias.meaning);
  command.add_scanned(kAccumulationOption, "N", "micro-batches a step: sets train.micro_batch");
}

void declare_train(Command root, CommandOptions& options) {
  declare_config(root, /*with_aliases=*/true);
  root.add_text("--resume", options.train.resume, "latest|PATH|none",
                "go on from a checkpoint of the run, or start anew beside it");
  root.add_flag("--overwrite", options.train.overwrite, "delete the checkpoints of an earlier run");
  root.add_flag("--dry-run", options.train.dry_run,
                "check everything, print the plan, train nothing");
  root.add_flag("--quiet", options.train.quiet, "warnings and errors only");
  root.add_flag("--log-json", options.train.log_json, "log lines as JSON objects");
  root.add_choice<ColorMode>(
      "--color", options.train.color,
      {{"auto", ColorMode::automatic}, {"always", ColorMode::always}, {"never", ColorMode::never}},
      "colour on standard error");
  root.add_flag("--version", options.wants_version, "same as the command 'version'");
  root.on_given([&options](const ScannedLine& line) {
    if (options.wants_version) return invoke("version", options.version, cmd_version);
    options.train.config = config_source(line);
    options.train.words = option_words(line);
    const bool names_model =
        std::any_of(line.options.begin(), line.options.end(), [](const auto& o) {
          return o.name == "--config" || o.name == "--model" || o.name == "--set";
        });
    if (!names_model)
      throw UsageError("there is nothing to train: give --config job.yaml or --model PRESET");
    if (options.train.overwrite && options.train.resume && *options.train.resume != "none")
      throw UsageError(
          "--overwrite deletes the checkpoints that --resume would go on from; give one of them");
    return invoke("train", options.train, cmd_train);
  });
}

}  // namespace dstrain
