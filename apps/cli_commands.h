// The commands by group: each function declares its commands below `root`. Values land in
// `options`, from where a command takes them when the line was read.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "apps/cli_parser.h"
#include "apps/commands.h"
#include "apps/rank_environment.h"

namespace dstrain {

struct CommandOptions {
  TrainOptions train;
  DataBuildOptions data_build;
  DataInspectOptions data_inspect;
  TokenizerTrainOptions tokenizer_train;
  TokenizerCodeOptions tokenizer_code;
  EvalOptions eval;
  GenerateOptions generate;
  ImportOptions import_hf;
  ExportOptions export_hf;
  CkptOptions ckpt;
  ConfigOptions config;
  VerifyOptions verify;
  BenchOptions bench;
  VersionOptions version;
  bool wants_version = false;  // deepseek-train --version
};

void declare_train(Command root, CommandOptions& options);           // the program itself
void declare_data_commands(Command root, CommandOptions& options);   // data, tokenizer
void declare_model_commands(Command root, CommandOptions& options);  // eval to ckpt
void declare_check_commands(Command root, CommandOptions& options);  // config to version

// --config and --set, and with aliases the short names of single keys.
void declare_config(Command command, bool with_aliases);

// The options as they were given, but for spelling and "--option=value", which become two words.
std::vector<std::string> option_words(const ScannedLine& line);

template <class Options>
Invocation invoke(const std::string& command, const Options& options, int (*run)(const Options&)) {
  return {command, options, [options, run] { return run(options); }};
}

// The same for a command that is the work of one process.
template <class Options>
Invocation invoke_once(const std::string& command, const Options& options,
                       int (*run)(const Options&)) {
  return {command, options, [command, options, run] {
            require_one_process(command, std::getenv);
            return run(options);
          }};
}

}  // namespace dstrain
