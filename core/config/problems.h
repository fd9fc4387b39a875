// Problems found in a job file, collected so that all of them are reported at once:
//
//   job.yaml:14:3: error: unknown key 'learning_rte' in 'optimizer'
//      14 |   learning_rte: 3e-4
//         |   ^~~~~~~~~~~~
//   hint: did you mean 'lr'?
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/base/error.h"

namespace dstrain {

// The complete report of one or more problems; its text is printed as it is.
class ConfigProblems : public ConfigError {
 public:
  using ConfigError::ConfigError;
};

// The text in single quotes for a message: clipped where it is long, control bytes as spaces.
std::string quote(std::string_view text);

// A place in one of the texts of a SourceTexts. Lines and columns start at 1; columns count bytes.
struct Location {
  int source = -1;  // index in SourceTexts; -1 = nowhere
  int line = 0;     // 0 = the source as a whole
  int column = 0;
  int length = 1;  // bytes to underline
};

// The files and command-line arguments that values came from.
class SourceTexts {
 public:
  // A file: `name` as the user gave it. Returns its index.
  int add_file(std::string name, std::string text);
  // A command-line argument, which is its own name: "--set optimizer.lr=abc".
  int add_argument(std::string argument);

  bool empty() const { return sources_.empty(); }
  bool is_file(size_t source) const { return sources_.at(source).is_file; }
  // "job.yaml:14:3", or the argument itself.
  std::string describe(const Location& location) const;
  // The source line with a caret below, two lines; empty where there is no line to show.
  std::string excerpt(const Location& location) const;

 private:
  struct Source {
    std::string name;
    std::string text;
    bool is_file = true;
  };
  std::vector<Source> sources_;
};

struct Problem {
  Location location;
  std::string message;  // a sentence without a full stop
  std::string hint;     // may be empty
};

class Problems {
 public:
  static constexpr size_t kShown = 20;

  // False once there are many more problems than will be shown; costly hints are not worth it then.
  bool wants_detail() const { return problems_.size() < 5 * kShown; }
  bool empty() const { return problems_.empty(); }
  const std::vector<Problem>& list() const { return problems_; }
  void add(const Location& location, std::string message, std::string hint = "");

  // Every problem in the format above, in the order of sources and lines.
  std::string report(const SourceTexts& sources) const;
  // Throws ConfigProblems with the report if there is any problem.
  void throw_if_any(const SourceTexts& sources) const;

 private:
  std::vector<Problem> problems_;
};

}  // namespace dstrain
