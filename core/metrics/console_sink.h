// What a person watching the run sees, on standard error.
//   live   on a terminal: one line rewritten at most ten times a second; evaluations, checkpoints
//   and
//          one step in ten percent (or in ten minutes) stay as lines above it
//   lines  elsewhere: one line a step, or one in log_every
//   quiet  only the result at the end, in one line; warnings come from the log
//   json   the lines of record_json.h instead of text
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "core/base/progress.h"
#include "core/metrics/loss_curve.h"
#include "core/metrics/sink.h"

namespace dstrain {

enum class ConsoleMode { live, lines, quiet, json };

// json wins over quiet. `term` is the value of TERM, or null.
ConsoleMode decide_console_mode(bool quiet, bool json, int fd, const char* term);

// "step 120/600  loss 3.4123  grad 0.81  lr 9.8e-04  4.61k tok/s  load 1.32x dead 0  ETA 3m12s":
// as many of the figures as fit into `columns`, the least needed left out first (step and loss
// never). With an ETA and from 120 columns on it starts with a bar.
std::string step_text(const StepRecord& record, std::optional<double> eta_s, int columns,
                      bool color);

struct ConsoleOptions {
  ConsoleMode mode = ConsoleMode::lines;
  bool color = false;
  int64_t log_every = 1;  // lines and json modes; the first, the last and skipped steps always show
  std::function<LiveLine::TimePoint()> now = std::chrono::steady_clock::now;
};

class ConsoleSink final : public MetricsSink {
 public:
  // `out` outlives the sink. Where it is live, the log's lines pass through it as long as the sink
  // exists, so that a warning does not end up inside the live line.
  ConsoleSink(LiveLine& out, ConsoleOptions options);
  ~ConsoleSink() override;
  ConsoleSink(const ConsoleSink&) = delete;
  ConsoleSink& operator=(const ConsoleSink&) = delete;

  void on_start(const StartupInfo& info) override;
  void on_step(const StepRecord& record) override;
  void on_eval(const EvalRecord& record) override;
  void on_checkpoint(const CheckpointRecord& record) override;
  void on_end(const RunSummary& summary) override;

 private:
  void print_json(std::string line);
  bool wants_line(const StepRecord& record, LiveLine::TimePoint now) const;

  LiveLine& out_;
  const ConsoleOptions options_;
  EtaEstimator eta_;
  LossCurve curve_;
  std::optional<LiveLine::TimePoint> last_line_;
};

}  // namespace dstrain
