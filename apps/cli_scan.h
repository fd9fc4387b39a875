// Reads argv against a table of commands and options. Names are checked before values, so that a
// mistyped option is called unknown instead of its value being taken for something else. A '_' in
// an option's name is as good as a '-'.
#pragma once

#include <string>
#include <vector>

namespace dstrain {

struct OptionSpec {
  std::string name;  // with its dashes: "--batch_size"
  bool takes_value = false;
  bool is_repeatable = false;
  bool is_text = false;  // free text: may be empty and long
};

struct CommandSpec {
  std::string name;
  std::vector<OptionSpec> options;
  std::vector<CommandSpec> commands;
  int max_arguments = 0;  // positional ones
  bool arguments_are_text = false;
};

struct GivenOption {
  std::string name;  // as in the table
  bool has_value = false;
  std::string value;
  std::string typed;  // "--batch-size 256"
};

struct ScannedLine {
  std::vector<std::string> commands;   // {"data", "build"}; empty for the program itself
  std::vector<GivenOption> options;    // in the order given
  std::vector<std::string> arguments;  // positional
  bool wants_help = false;
};

// Throws UsageError with a suggestion. `args` is without the program's name.
ScannedLine scan_arguments(const CommandSpec& program, const std::vector<std::string>& args);

}  // namespace dstrain
