// Commands with their options, declared in the program's own terms. Reading goes through
// scan_arguments(), which knows every name; values are read strictly and stored in the variables
// that the declaration named. cli_parser.cpp is the one file that includes CLI11.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "apps/cli.h"
#include "apps/cli_scan.h"
#include "core/config/field.h"

namespace dstrain {

enum class Presence { optional, required };

template <class Value>
using Choices = std::vector<std::pair<std::string, Value>>;

// One command, or the program itself; a handle into the parser. Names begin with dashes, those of
// positional arguments do not. Targets must outlive the parser. A `type` of "TEXT" may be empty.
class Command {
 public:
  using Maker = std::function<Invocation(const ScannedLine&)>;

  Command add_command(const char* name, const char* meaning);
  // What the command does; a command without one only holds others.
  void on_given(Maker maker);

  void add_text(const std::string& name, std::string& target, const char* type, const char* meaning,
                Presence presence = Presence::optional);
  void add_text(const std::string& name, std::optional<std::string>& target, const char* type,
                const char* meaning);
  // Repeatable; a value in brackets stays one value.
  void add_texts(const std::string& name, std::vector<std::string>& target, const char* type,
                 const char* meaning);
  void add_integer(const std::string& name, int64_t& target, const Range& range,
                   const char* meaning, Presence presence = Presence::optional);
  void add_integer(const std::string& name, std::optional<int64_t>& target, const Range& range,
                   const char* meaning);
  void add_number(const std::string& name, double& target, const Range& range, const char* meaning);
  // Where it is given, `target` becomes `value`.
  void add_flag(const std::string& name, bool& target, const char* meaning, bool value = true);
  template <class Value>
  void add_choice(const std::string& name, Value& target, const Choices<Value>& choices,
                  const char* meaning);

  // Options and positional arguments whose values are taken from the scanned line, in the order
  // given.
  void add_scanned(const std::string& name, const char* type, const char* meaning,
                   bool is_repeatable = false);
  void add_arguments(const char* name, const char* type, const char* meaning, Presence presence);

 private:
  friend class CommandParser;
  struct Node;
  explicit Command(Node& node) : node_(&node) {}
  void add_named(const std::string& name, const std::vector<std::string>& choices,
                 std::function<void(size_t)> store, const char* meaning);
  Node* node_;
};

class CommandParser {
 public:
  CommandParser(const char* program, const char* introduction);
  ~CommandParser();

  Command program();
  // The end of every help text. Call it last.
  void set_footer(const char* text);

  // What the line asks for: a command, or the help of one. Throws UsageError.
  Invocation parse(const std::vector<std::string>& args);

 private:
  std::unique_ptr<Command::Node> root_;
};

template <class Value>
void Command::add_choice(const std::string& name, Value& target, const Choices<Value>& choices,
                         const char* meaning) {
  std::vector<std::string> names;
  for (const auto& [text, value] : choices) names.push_back(text);
  add_named(
      name, names, [choices, &target](size_t chosen) { target = choices[chosen].second; }, meaning);
}

// "a, b and c"
std::string join_names(const std::vector<std::string>& names, const char* last);

}  // namespace dstrain
