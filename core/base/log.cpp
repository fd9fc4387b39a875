#include "core/base/log.h"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/ansicolor_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

namespace dstrain {
namespace {

struct LogState {
  LogState()
      : logger(std::make_shared<spdlog::logger>(
            "dstrain", std::make_shared<spdlog::sinks::stderr_sink_mt>())) {
    logger->set_pattern("%v");
  }

  LogOptions options;
  std::shared_ptr<spdlog::logger> logger;
  std::mutex writer_mutex;
  LogWriter writer;
};

LogState& state() {
  static LogState instance;
  return instance;
}

spdlog::level::level_enum to_spdlog(LogLevel level) {
  switch (level) {
    case LogLevel::debug: return spdlog::level::debug;
    case LogLevel::info: return spdlog::level::info;
    case LogLevel::warning: return spdlog::level::warn;
    case LogLevel::error: return spdlog::level::err;
  }
  return spdlog::level::info;
}

const char* level_word(LogLevel level) {
  switch (level) {
    case LogLevel::debug: return "debug";
    case LogLevel::info: return "info";
    case LogLevel::warning: return "warning";
    case LogLevel::error: return "error";
  }
  return "info";
}

void write_line(LogLevel level, std::string_view line) {
  LogState& s = state();
  {
    const std::lock_guard lock(s.writer_mutex);
    if (s.writer) return s.writer(line);
  }
  s.logger->log(to_spdlog(level), "{}", line);
}

}  // namespace

void init_log(const LogOptions& options) {
  LogState& s = state();
  s.options = options;
  spdlog::sink_ptr sink;
  if (options.color)
    sink = std::make_shared<spdlog::sinks::ansicolor_stderr_sink_mt>(spdlog::color_mode::always);
  else
    sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  s.logger = std::make_shared<spdlog::logger>("dstrain", sink);
  s.logger->set_pattern("%v");
  s.logger->set_level(to_spdlog(options.level));
  s.logger->flush_on(spdlog::level::info);
}

void set_log_writer(LogWriter writer) {
  const std::lock_guard lock(state().writer_mutex);
  state().writer = std::move(writer);
}

bool log_enabled(LogLevel level) { return state().logger->should_log(to_spdlog(level)); }

void log_line(LogLevel level, std::string_view text) {
  if (!log_enabled(level)) return;
  const LogState& s = state();
  if (s.options.json) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const double seconds = std::chrono::duration<double>(now).count();
    nlohmann::ordered_json line = {{"ts", seconds}, {"level", level_word(level)}};
    if (s.options.world_size > 1) line["rank"] = s.options.rank;
    line["message"] = std::string(text);
    return write_line(level, line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }
  std::string prefix;
  if (s.options.rank > 0) prefix = fmt::format("rank {}: ", s.options.rank);
  if (level == LogLevel::warning || level == LogLevel::error) {
    const char* on = level == LogLevel::error ? "\033[1;31m" : "\033[1;33m";
    if (s.options.color)
      prefix += fmt::format("{}{}:\033[0m ", on, level_word(level));
    else
      prefix += fmt::format("{}: ", level_word(level));
  }
  write_line(level, prefix.append(text));
}

}  // namespace dstrain
