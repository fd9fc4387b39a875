#include "apps/cli_parser.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <list>

#include "apps/cli_config.h"
#include "core/base/error.h"
#include "core/config/field_tree.h"
#include "core/config/problems.h"
#include "core/config/scalar.h"

namespace dstrain {

// A command as CLI11 knows it. The commands below it stay where they are: handles point at them.
struct Command::Node {
  explicit Node(CLI::App& given) : app(given) {}
  Node(const char* program, const char* introduction)
      : own(std::make_unique<CLI::App>(introduction, program)), app(*own) {}

  std::unique_ptr<CLI::App> own;  // the program's; CLI11 owns those below it
  CLI::App& app;
  Maker maker;
  std::list<Node> commands;
  std::vector<std::string> arguments;  // CLI11 wants a place for them; it splits those in brackets
};

namespace {

using Store = std::function<void(const std::string&)>;

CLI::Option* add_stored(CLI::App& app, const std::string& name, const Store& store,
                        const std::string& type, const char* meaning) {
  return app.add_option_function<std::string>(name, store, meaning)->type_name(type);
}

// Target is a number or an optional of one.
template <class Target, class Number>
CLI::Option* add_parsed(CLI::App& app, const std::string& name, Target& target, const char* type,
                        const char* meaning, const Range& range,
                        Parsed<Number> (*parser)(std::string_view)) {
  const auto store = [name, range, parser, &target](const std::string& text) {
    const Parsed<Number> parsed = parser(text);
    if (!parsed.value) refuse_value(name, parsed.reason, parsed.hint);
    if (!range.contains(static_cast<double>(*parsed.value)))
      refuse_value(name, fmt::format("must be {}, got {}", range_text(range), quote(text)));
    target = *parsed.value;
  };
  return add_stored(app, name, store, type, meaning);
}

// The table that scan_arguments() reads by.
CommandSpec spec_of(const CLI::App& app) {
  CommandSpec spec;
  spec.name = app.get_name();
  for (const CLI::Option* option : app.get_options()) {
    const bool is_text = option->get_type_name() == "TEXT";
    if (option->get_positional()) {
      spec.max_arguments += option->get_items_expected_max();
      spec.arguments_are_text = is_text;
      continue;
    }
    OptionSpec entry{"--" + option->get_lnames().at(0), option->get_items_expected_max() > 0,
                     option->get_items_expected_max() > 1,
                     is_text || option->get_type_name() == "KEY=VALUE"};
    spec.options.push_back(std::move(entry));
  }
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    spec.commands.push_back(spec_of(*command));
  return spec;
}

void require_given(const std::string& program, const CLI::App& app, const ScannedLine& line) {
  for (const CLI::Option* option : app.get_options()) {
    if (!option->get_required()) continue;
    const auto is_it = [&](const GivenOption& given) { return given.name == option->get_name(); };
    const bool is_given = option->get_positional()
                              ? !line.arguments.empty()
                              : std::any_of(line.options.begin(), line.options.end(), is_it);
    if (is_given) continue;
    const std::string command = fmt::format("{}", fmt::join(line.commands, " "));
    throw UsageError(fmt::format("{} needs {}{}\nhint: see '{} {} --help'", command,
                                 option->get_positional() ? "" : option->get_name() + " ",
                                 option->get_type_name(), program, command));
  }
}

// The scanned line has known names only; CLI11 stores the values where they were declared.
void read_values(CLI::App& root, const ScannedLine& line) {
  std::vector<std::string> tokens = line.commands;
  for (const GivenOption& option : line.options) {
    tokens.push_back(option.name);
    if (option.has_value) tokens.push_back(option.value);
  }
  if (!line.arguments.empty()) tokens.push_back("--");
  tokens.insert(tokens.end(), line.arguments.begin(), line.arguments.end());
  std::reverse(tokens.begin(), tokens.end());
  try {
    root.parse(std::move(tokens));
  } catch (const CLI::Error& e) {
    throw UsageError(e.what());
  }
}

Invocation help(const std::string& text) {
  return {"help", {}, [text] {
            std::fputs(text.c_str(), stdout);
            return 0;
          }};
}

}  // namespace

Command Command::add_command(const char* name, const char* meaning) {
  return Command(node_->commands.emplace_back(*node_->app.add_subcommand(name, meaning)));
}

void Command::on_given(Maker maker) {
  node_->maker = std::move(maker);
}

void Command::add_text(const std::string& name, std::string& target, const char* type,
                       const char* meaning, Presence presence) {
  const auto store = [&target](const std::string& value) { target = value; };
  add_stored(node_->app, name, store, type, meaning)->required(presence == Presence::required);
}

void Command::add_text(const std::string& name, std::optional<std::string>& target,
                       const char* type, const char* meaning) {
  const auto store = [&target](const std::string& value) { target = value; };
  add_stored(node_->app, name, store, type, meaning);
}

void Command::add_texts(const std::string& name, std::vector<std::string>& target, const char* type,
                        const char* meaning) {
  node_->app.add_option(name, target, meaning)->type_name(type)->allow_extra_args(false);
}

void Command::add_integer(const std::string& name, int64_t& target, const Range& range,
                          const char* meaning, Presence presence) {
  add_parsed(node_->app, name, target, "N", meaning, range, parse_int)
      ->required(presence == Presence::required);
}

void Command::add_integer(const std::string& name, std::optional<int64_t>& target,
                          const Range& range, const char* meaning) {
  add_parsed(node_->app, name, target, "N", meaning, range, parse_int);
}

void Command::add_number(const std::string& name, double& target, const Range& range,
                         const char* meaning) {
  add_parsed(node_->app, name, target, "X", meaning, range, parse_double);
}

void Command::add_flag(const std::string& name, bool& target, const char* meaning, bool value) {
  node_->app.add_flag_callback(
      name, [&target, value] { target = value; }, meaning);
}

void Command::add_named(const std::string& name, const std::vector<std::string>& choices,
                        std::function<void(size_t)> store, const char* meaning) {
  const std::string names = fmt::format("{}", fmt::join(choices, "|"));
  const auto choose = [=](const std::string& given) {
    const auto at = std::find(choices.begin(), choices.end(), given);
    if (at == choices.end())
      refuse_value(name, fmt::format("must be {}, got {}", names, quote(given)));
    store(static_cast<size_t>(at - choices.begin()));
  };
  add_stored(node_->app, name, choose, names, meaning);
}

void Command::add_scanned(const std::string& name, const char* type, const char* meaning,
                          bool is_repeatable) {
  // A constant chooses the add_option() that stores nothing.
  const char* const text = meaning;
  CLI::Option* option = node_->app.add_option(name, text)->type_name(type);
  if (is_repeatable) option->expected(1, 1 << 20)->allow_extra_args(false);
}

void Command::add_arguments(const char* name, const char* type, const char* meaning,
                            Presence presence) {
  node_->app.add_option(name, node_->arguments, meaning)
      ->type_name(type)
      ->required(presence == Presence::required);
}

CommandParser::CommandParser(const char* program, const char* introduction)
    : root_(std::make_unique<Command::Node>(program, introduction)) {
  root_->app.get_formatter()->column_width(32);
}

CommandParser::~CommandParser() = default;

Command CommandParser::program() {
  return Command(*root_);
}

void CommandParser::set_footer(const char* text) {
  root_->app.footer(text);
}

Invocation CommandParser::parse(const std::vector<std::string>& args) {
  const ScannedLine line = scan_arguments(spec_of(root_->app), args);
  const std::string program = root_->app.get_name();
  Command::Node* node = root_.get();
  std::string title;  // of the commands around it
  for (const std::string& name : line.commands) {
    title += (title.empty() ? "" : " ") + node->app.get_name();
    for (Command::Node& command : node->commands)
      if (command.app.get_name() == name) {
        node = &command;
        break;
      }
  }
  if (line.wants_help) return help(node->app.help(title));
  if (!node->maker) {
    std::vector<std::string> names;
    for (const Command::Node& command : node->commands) names.push_back(command.app.get_name());
    throw UsageError(
        fmt::format("{} needs a command: {}", node->app.get_name(), join_names(names, " or ")));
  }
  require_given(program, node->app, line);
  read_values(root_->app, line);
  return node->maker(line);
}

std::string join_names(const std::vector<std::string>& names, const char* last) {
  std::string text;
  for (size_t i = 0; i < names.size(); ++i)
    text += (i == 0 ? "" : i + 1 == names.size() ? last : ", ") + names[i];
  return text;
}

}  // namespace dstrain
