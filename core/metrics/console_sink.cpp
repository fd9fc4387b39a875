#include "core/metrics/console_sink.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/metrics/record_json.h"
#include "core/metrics/report.h"

namespace dstrain {
namespace {

constexpr int kBarFromColumns = 120;
constexpr int kBarCells = 20;
constexpr int kUnlimited = std::numeric_limits<int>::max();
constexpr std::chrono::minutes kLongestSilence{10};

constexpr const char* kRed = "\033[31m";
constexpr const char* kYellow = "\033[33m";
constexpr const char* kGreen = "\033[32m";
constexpr const char* kCyan = "\033[36m";

std::string paint(const std::string& text, const char* color, bool on) {
  return on && color != nullptr ? fmt::format("{}{}\033[0m", color, text) : text;
}

struct Figure {
  std::string text;
  int rank;  // 0 always shows; the highest goes first when columns are short
  const char* color = nullptr;
};

std::string bar(const StepRecord& record) {
  const double share =
      record.steps > 0 ? static_cast<double>(record.step) / static_cast<double>(record.steps) : 1.0;
  const double clamped = std::clamp(share, 0.0, 1.0);
  const auto full = static_cast<size_t>(clamped * kBarCells);
  return fmt::format("[{}{}] {:>3.0f}%", std::string(full, '='), std::string(kBarCells - full, ' '),
                     std::floor(100.0 * clamped));
}

// In the order of display. The step is padded to the width of the last one, so that a live line
// does not wander.
std::vector<Figure> figures_of(const StepRecord& record, std::optional<double> eta_s, int columns) {
  std::vector<Figure> figures;
  if (columns >= kBarFromColumns && columns != kUnlimited && eta_s)
    figures.push_back({bar(record), 9});
  const std::string steps = fmt::format("{}", record.steps);
  figures.push_back({fmt::format("step {:>{}}/{}", record.step, steps.size(), steps), 0});
  figures.push_back(
      {"loss " + format_fixed(record.loss, 4), 0, std::isfinite(record.loss) ? nullptr : kRed});
  if (record.mtp_loss) figures.push_back({"mtp " + format_fixed(*record.mtp_loss, 4), 7});
  figures.push_back({"grad " + format_fixed(record.grad_norm, 2), 3});
  if (record.skipped)
    figures.push_back({fmt::format("skipped ({} so far)", record.skipped_total), 1, kYellow});
  figures.push_back({fmt::format("lr {:.1e}", record.lr), 5});
  figures.push_back({format_count(record.tokens_per_s) + " tok/s", 2});
  if (record.experts) {
    figures.push_back(
        {fmt::format("load {}x dead {}", format_fixed(record.experts->max_over_mean_worst, 2),
                     record.experts->dead_worst),
         4, record.experts->dead_worst > 0 ? kYellow : nullptr});
  }
  if (record.mfu) figures.push_back({fmt::format("mfu {:.1f}%", 100.0 * *record.mfu), 6});
  if (eta_s && record.step < record.steps) figures.push_back({"ETA " + format_duration(*eta_s), 1});
  return figures;
}

int width_of(const std::vector<Figure>& figures) {
  int width = 0;
  for (const Figure& figure : figures) width += static_cast<int>(figure.text.size()) + 2;
  return width - 2;
}

std::string eval_text(const EvalRecord& record) {
  std::string out =
      fmt::format("eval  step {}  {}  loss {}  perplexity {}", record.step, record.set,
                  format_fixed(record.loss, 4), format_fixed(record.perplexity, 2));
  if (record.bits_per_byte)
    out += fmt::format("  {} bits/byte", format_fixed(*record.bits_per_byte, 4));
  return out + fmt::format("  {} tokens in {}", format_count(static_cast<double>(record.tokens)),
                           format_duration(record.seconds));
}

std::string checkpoint_text(const CheckpointRecord& record) {
  if (!record.ok)
    return fmt::format("checkpoint  step {}  FAILED after {}: {}", record.step,
                       format_duration(record.seconds), record.error);
  return fmt::format("checkpoint  step {}  {} in {}, training waited {}", record.step,
                     format_bytes(record.bytes), format_duration(record.seconds),
                     format_duration(record.stall_ms / 1e3));
}

}  // namespace

ConsoleMode decide_console_mode(bool quiet, bool json, int fd, const char* term) {
  if (json) return ConsoleMode::json;
  if (quiet) return ConsoleMode::quiet;
  return can_rewrite_line(fd, term) ? ConsoleMode::live : ConsoleMode::lines;
}

std::string step_text(const StepRecord& record, std::optional<double> eta_s, int columns,
                      bool color) {
  std::vector<Figure> figures = figures_of(record, eta_s, columns);
  while (width_of(figures) > columns) {
    const auto least =
        std::max_element(figures.begin(), figures.end(),
                         [](const Figure& a, const Figure& b) { return a.rank < b.rank; });
    if (least->rank == 0) break;
    figures.erase(least);
  }
  std::string out;
  for (const Figure& figure : figures) {
    if (!out.empty()) out += "  ";
    out += paint(figure.text, figure.color, color);
  }
  return out;
}

ConsoleSink::ConsoleSink(LiveLine& out, ConsoleOptions options)
    : out_(out), options_(std::move(options)) {
  if (out_.live()) set_log_writer([&out](std::string_view line) { out.print(line); });
}

ConsoleSink::~ConsoleSink() {
  if (out_.live()) set_log_writer({});
}

// print() ends the line itself.
void ConsoleSink::print_json(std::string line) {
  line.pop_back();
  out_.print(line);
}

void ConsoleSink::on_start(const StartupInfo& info) {
  if (options_.mode == ConsoleMode::json) return print_json(json_line(info, unix_seconds()));
  if (options_.mode == ConsoleMode::quiet) return;
  std::string table = startup_table(info, options_.color);
  table.pop_back();
  out_.print(table);
}

bool ConsoleSink::wants_line(const StepRecord& record, LiveLine::TimePoint now) const {
  if (!last_line_ || record.skipped || record.step == record.steps) return true;
  if (options_.mode != ConsoleMode::live) return record.step % options_.log_every == 0;
  const int64_t tenth = std::max<int64_t>((record.steps + 9) / 10, 1);
  return record.step % tenth == 0 || now - *last_line_ >= kLongestSilence;
}

void ConsoleSink::on_step(const StepRecord& record) {
  if (options_.mode == ConsoleMode::quiet) return;
  curve_.add(record.step, record.loss);
  const LiveLine::TimePoint now = options_.now();
  const std::optional<double> eta = eta_.update(record.step, record.steps, now);
  if (wants_line(record, now)) {
    last_line_ = now;
    if (options_.mode == ConsoleMode::json) return print_json(json_line(record, unix_seconds()));
    out_.print(options_.mode == ConsoleMode::live
                   ? step_text(record, std::nullopt, out_.width(), options_.color)
                   : step_text(record, eta, kUnlimited, options_.color));
  }
  if (options_.mode == ConsoleMode::live && out_.due(now))
    out_.show(step_text(record, eta, out_.width() - 1, options_.color), now);
}

void ConsoleSink::on_eval(const EvalRecord& record) {
  if (options_.mode == ConsoleMode::quiet) return;
  if (options_.mode == ConsoleMode::json) return print_json(json_line(record, unix_seconds()));
  out_.print(paint(eval_text(record), kCyan, options_.color));
}

void ConsoleSink::on_checkpoint(const CheckpointRecord& record) {
  if (options_.mode == ConsoleMode::quiet && record.ok) return;
  if (options_.mode == ConsoleMode::json) return print_json(json_line(record, unix_seconds()));
  out_.print(paint(checkpoint_text(record), record.ok ? kGreen : kRed, options_.color));
}

void ConsoleSink::on_end(const RunSummary& summary) {
  out_.clear();
  if (options_.mode == ConsoleMode::json) return print_json(json_line(summary, unix_seconds()));
  if (options_.mode == ConsoleMode::quiet) return out_.print(final_line(summary));
  constexpr int kCurveColumns = 64, kCurveRows = 8;
  std::string text = curve_.draw(std::min(kCurveColumns, out_.width() - 16), kCurveRows);
  if (!text.empty()) text = "Training loss\n" + text;
  text += final_report(summary, options_.color);
  text.pop_back();
  out_.print(text);
}

}  // namespace dstrain
