// Lines for people, on standard error. Standard output is for results only.
// Thread-safe. Level and colour are set once by apps/; rank 0 logs everything, others warnings up.
#pragma once

#include <fmt/format.h>

#include <functional>
#include <string_view>
#include <utility>

namespace dstrain {

enum class LogLevel { debug, info, warning, error };

struct LogOptions {
  LogLevel level = LogLevel::info;
  bool color = false;  // only if standard error is a terminal
  bool json = false;   // one JSON object a line: ts, level, message
  int rank = 0;        // others than rank 0 begin their lines with "rank 3: "
  int world_size = 1;
};

void init_log(const LogOptions& options);

// Where finished lines (without their newline) go instead of standard error; empty restores that.
// For whoever keeps a live line on the terminal and has to lift it first.
using LogWriter = std::function<void(std::string_view line)>;
void set_log_writer(LogWriter writer);

bool log_enabled(LogLevel level);
void log_line(LogLevel level, std::string_view text);

template <class... Args>
void log_debug(fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::debug))
    log_line(LogLevel::debug, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::info))
    log_line(LogLevel::info, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::warning))
    log_line(LogLevel::warning, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void log_error(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::error, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace dstrain
