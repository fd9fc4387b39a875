// The command line: argv to one command with its options.
#pragma once

#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "apps/commands.h"

namespace dstrain {

struct Invocation {
  std::string command;  // "train", "data build", ..., or "help"
  std::variant<std::monostate, TrainOptions, DataBuildOptions, DataInspectOptions,
               TokenizerTrainOptions, TokenizerCodeOptions, EvalOptions, GenerateOptions,
               ImportOptions, ExportOptions, CkptOptions, ConfigOptions, VerifyOptions,
               BenchOptions, VersionOptions>
      options;
  std::function<int()> run;  // runs the command with `options`
};

// `args` is without the program's name. Throws UsageError; without any argument its text is the
// short help.
Invocation parse_command_line(const std::vector<std::string>& args);

}  // namespace dstrain
