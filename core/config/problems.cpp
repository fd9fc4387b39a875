#include "core/config/problems.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>

namespace dstrain {
namespace {

constexpr size_t kExcerptBytes = 100;  // of a source line
constexpr size_t kNameBytes = 160;     // of a file name or argument
constexpr size_t kQuoteBytes = 60;     // of a value

bool is_continuation(char c) {
  return (static_cast<unsigned char>(c) & 0xC0) == 0x80;
}

// The text with control bytes shown as spaces, so that a message cannot steer a terminal.
std::string printable(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = ' ';
  return out;
}

std::string clip(std::string_view text, size_t limit) {
  if (text.size() <= limit) return printable(text);
  while (limit > 0 && is_continuation(text[limit])) --limit;
  return printable(text.substr(0, limit)) + "...";
}

int64_t count_characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return !is_continuation(c); });
}

std::string_view line_of(std::string_view text, int line) {
  for (int i = 1; i < line; ++i) {
    const size_t end = text.find('\n');
    if (end == std::string_view::npos) return {};
    text.remove_prefix(end + 1);
  }
  text = text.substr(0, text.find('\n'));
  if (!text.empty() && text.back() == '\r') text.remove_suffix(1);
  return text;
}

}  // namespace

std::string quote(std::string_view text) {
  return "'" + clip(text, kQuoteBytes) + "'";
}

int SourceTexts::add_file(std::string name, std::string text) {
  sources_.push_back({std::move(name), std::move(text), /*is_file=*/true});
  return static_cast<int>(sources_.size()) - 1;
}

int SourceTexts::add_argument(std::string argument) {
  sources_.push_back({std::move(argument), {}, /*is_file=*/false});
  return static_cast<int>(sources_.size()) - 1;
}

std::string SourceTexts::describe(const Location& location) const {
  if (location.source < 0) return {};
  const Source& source = sources_.at(static_cast<size_t>(location.source));
  const std::string name = clip(source.name, kNameBytes);
  if (!source.is_file || location.line == 0) return name;
  return fmt::format("{}:{}:{}", name, location.line, location.column);
}

std::string SourceTexts::excerpt(const Location& location) const {
  if (location.source < 0 || location.line == 0) return {};
  const Source& source = sources_.at(static_cast<size_t>(location.source));
  if (!source.is_file) return {};
  const std::string_view line = line_of(source.text, location.line);
  const size_t column =
      std::min(static_cast<size_t>(std::max(location.column, 1) - 1), line.size());

  // A long line is shown from a little before the caret.
  size_t first =
      column > kExcerptBytes / 2 && line.size() > kExcerptBytes ? column - kExcerptBytes / 2 : 0;
  while (first < column && is_continuation(line[first])) ++first;
  size_t last = std::min(line.size(), first + kExcerptBytes);
  while (last > column && last < line.size() && is_continuation(line[last])) --last;

  const std::string_view before = line.substr(first, column - first);
  const std::string_view marked = line.substr(
      column, std::min(static_cast<size_t>(std::max(location.length, 1)), last - column));
  const int64_t pad = count_characters(before);
  const int64_t tildes = std::max<int64_t>(count_characters(marked) - 1, 0);
  return fmt::format("{:>5} | {}\n{:>5} | {:{}}^{}\n", location.line,
                     printable(line.substr(first, last - first)), "", "", pad,
                     std::string(static_cast<size_t>(tildes), '~'));
}

void Problems::add(const Location& location, std::string message, std::string hint) {
  problems_.push_back({location, std::move(message), std::move(hint)});
}

std::string Problems::report(const SourceTexts& sources) const {
  std::vector<const Problem*> order;
  for (const Problem& problem : problems_) order.push_back(&problem);
  std::stable_sort(order.begin(), order.end(), [](const Problem* a, const Problem* b) {
    return std::tie(a->location.source, a->location.line, a->location.column) <
           std::tie(b->location.source, b->location.line, b->location.column);
  });
  std::string text;
  for (size_t i = 0; i < order.size() && i < kShown; ++i) {
    const Problem& problem = *order[i];
    const std::string place = sources.describe(problem.location);
    text += fmt::format("{}error: {}\n{}", place.empty() ? "" : place + ": ", problem.message,
                        sources.excerpt(problem.location));
    if (!problem.hint.empty()) text += fmt::format("hint: {}\n", problem.hint);
  }
  if (order.size() > kShown) text += fmt::format("and {} more problems\n", order.size() - kShown);
  text.pop_back();  // the last newline
  return text;
}

void Problems::throw_if_any(const SourceTexts& sources) const {
  if (!empty()) throw ConfigProblems(report(sources));
}

}  // namespace dstrain
