#include "apps/cli.h"

#include "apps/cli_commands.h"
#include "apps/cli_parser.h"
#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr const char* kProgram = "deepseek-train";

constexpr const char* kIntroduction =
    R"(deepseek-train: trains DeepSeek-style mixture-of-experts transformers

Examples:
  deepseek-train --config configs/quickstart.yaml
  deepseek-train --config job.yaml --set optimizer.lr=3e-4 --dry-run
  deepseek-train --config job.yaml --resume latest
  deepseek-train data build text/ --tokenizer tok.json --output data/train
  deepseek-train generate --run runs/kjv-moe --prompt "In the beginning"
  deepseek-train config explain optimizer.lr
)";

constexpr const char* kExitCodes =
    R"(Exit codes: 0 finished, 1 failed while running, 2 wrong command line,
  65 malformed data or checkpoint, 66 input missing, 74 storage failed,
  75 stopped after a clean save (start again with --resume latest),
  77 permission denied, 78 wrong job file.
'deepseek-train COMMAND --help' has the options of a command.)";

constexpr const char* kShortHelp =
    R"(nothing to do
usage: deepseek-train --config job.yaml        trains
       deepseek-train --help                   all commands and options)";

}  // namespace

Invocation parse_command_line(const std::vector<std::string>& args) {
  if (args.empty()) throw UsageError(kShortHelp);
  // "help data build" is "data build --help".
  std::vector<std::string> tokens = args;
  if (tokens[0] == "help") {
    tokens.erase(tokens.begin());
    tokens.push_back("--help");
  }
  CommandOptions options;
  CommandParser parser(kProgram, kIntroduction);
  declare_train(parser.program(), options);
  declare_data_commands(parser.program(), options);
  declare_model_commands(parser.program(), options);
  declare_check_commands(parser.program(), options);
  parser.set_footer(kExitCodes);
  return parser.parse(tokens);
}

}  // namespace dstrain
