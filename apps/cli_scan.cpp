#include "apps/cli_scan.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>

#include "core/base/error.h"
#include "core/config/problems.h"
#include "core/config/suggest.h"

namespace dstrain {
namespace {

constexpr size_t kMaxValueBytes = 4095;  // what a path may have

std::string with_dashes(std::string name) {
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

bool is_option(const std::string& token) {
  // "-5" is a number and "-" is standard input by custom.
  return token.size() > 1 && token[0] == '-' && !std::isdigit(static_cast<unsigned char>(token[1]));
}

class Scanner {
 public:
  Scanner(const CommandSpec& program, const std::vector<std::string>& args)
      : command_(&program), program_(program), args_(args) {}

  ScannedLine scan() {
    bool options_ended = false;
    while (next_ < args_.size()) {
      const std::string& token = args_[next_++];
      if (!options_ended && token == "--") {
        options_ended = true;
      } else if (!options_ended && is_option(token)) {
        take_option(token);
      } else if (!take_command(token)) {
        take_argument(token);
      }
    }
    return std::move(line_);
  }

 private:
  [[noreturn]] void refuse(const std::string& message, const std::string& hint = "") const {
    throw UsageError(message + "\nhint: " + (hint.empty() ? "see '" + title() + " --help'" : hint));
  }

  // "deepseek-train data build"
  std::string title() const {
    return fmt::format("{}{}{}", program_.name, line_.commands.empty() ? "" : " ",
                       fmt::join(line_.commands, " "));
  }

  const OptionSpec* find(const std::string& name) const {
    const std::string wanted = with_dashes(name);
    for (const OptionSpec& option : command_->options)
      if (with_dashes(option.name) == wanted) return &option;
    return nullptr;
  }

  void take_option(const std::string& token) {
    const size_t equals = token.find('=');
    const std::string name = token.substr(0, equals);
    if (token == "-h" || token == "--help") {
      line_.wants_help = true;
      return;
    }
    const OptionSpec* option = find(name);
    if (!option) refuse_unknown_option(name);
    if (!option->takes_value) {
      if (equals != std::string::npos) refuse(fmt::format("{} takes no value", name));
      line_.options.push_back({option->name, /*has_value=*/false, "", name});
      return;
    }
    std::string value;
    if (equals != std::string::npos) {
      value = token.substr(equals + 1);
    } else {
      if (next_ == args_.size() || is_known_option(args_[next_]))
        refuse(fmt::format("{} needs a value", name));
      value = args_[next_++];
    }
    if (value.empty() && !option->is_text) refuse(fmt::format("the value of {} is empty", name));
    if (value.size() > kMaxValueBytes && !option->is_text)
      refuse(fmt::format("the value of {} is longer than {} bytes", name, kMaxValueBytes));
    const bool is_repeated =
        std::any_of(line_.options.begin(), line_.options.end(),
                    [&](const GivenOption& o) { return o.name == option->name; });
    if (is_repeated && !option->is_repeatable) refuse(fmt::format("{} is given twice", name));
    line_.options.push_back({option->name, /*has_value=*/true, value, name + " " + value});
  }

  bool is_known_option(const std::string& token) const {
    if (!is_option(token)) return false;
    return token == "--help" || token == "-h" || find(token.substr(0, token.find('='))) != nullptr;
  }

  [[noreturn]] void refuse_unknown_option(const std::string& name) const {
    std::vector<std::string> names;
    for (const OptionSpec& option : command_->options) names.push_back(option.name);
    const auto near = closest_word(with_dashes(name), names);
    const std::string of = line_.commands.empty() ? "" : " of '" + title() + "'";
    if (near)
      refuse(fmt::format("unknown option {}{}", quote(name), of),
             fmt::format("did you mean {}?", *near));
    if (std::any_of(program_.options.begin(), program_.options.end(),
                    [&](const OptionSpec& o) { return with_dashes(o.name) == with_dashes(name); }))
      refuse(fmt::format("unknown option {}{}", quote(name), of),
             "it is an option of training only");
    refuse(fmt::format("unknown option {}{}", quote(name), of));
  }

  bool take_command(const std::string& token) {
    if (command_->commands.empty() || !line_.arguments.empty()) return false;
    for (const CommandSpec& command : command_->commands) {
      if (command.name != token) continue;
      if (!line_.options.empty())
        refuse(fmt::format("{} stands before the command '{}'", line_.options[0].typed, token),
               "options of a command follow its name");
      command_ = &command;
      line_.commands.push_back(token);
      return true;
    }
    refuse_unknown_command(token);
  }

  [[noreturn]] void refuse_unknown_command(const std::string& token) const {
    const std::string full_name = fmt::format("{}{}{}", fmt::join(line_.commands, " "),
                                              line_.commands.empty() ? "" : " ", token);
    const std::string message = "unknown command " + quote(full_name);
    // Training is the program itself.
    const bool is_training =
        line_.commands.empty() && (token.ends_with(".yaml") || token.ends_with(".yml") ||
                                   (token.size() < 10 && edit_distance(token, "train") <= 1));
    if (is_training) refuse(message, "training is 'deepseek-train --config job.yaml'");
    std::vector<std::string> names;
    for (const CommandSpec& command : command_->commands) names.push_back(command.name);
    if (const auto near = closest_word(token, names))
      refuse(message, fmt::format("did you mean '{}'?", *near));
    refuse(message, fmt::format("commands are {}", fmt::join(names, ", ")));
  }

  void take_argument(const std::string& token) {
    if (static_cast<int>(line_.arguments.size()) >= command_->max_arguments)
      refuse(fmt::format("unexpected argument {}", quote(token)));
    if (token.empty() && !command_->arguments_are_text) refuse("an argument is empty");
    if (token.size() > kMaxValueBytes && !command_->arguments_are_text)
      refuse(fmt::format("the argument {} is longer than {} bytes", quote(token), kMaxValueBytes));
    line_.arguments.push_back(token);
  }

  const CommandSpec* command_;  // the innermost so far
  const CommandSpec& program_;
  const std::vector<std::string>& args_;
  size_t next_ = 0;
  ScannedLine line_;
};

}  // namespace

ScannedLine scan_arguments(const CommandSpec& program, const std::vector<std::string>& args) {
  return Scanner(program, args).scan();
}

}  // namespace dstrain
