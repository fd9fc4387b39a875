#include "parallel/pipeline_schedule_timeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace dstrain {
namespace {

using Span = PipelineTimeline::Span;

double cost(const PipelineCosts& costs, ActionKind kind) {
  switch (kind) {
    case ActionKind::forward:
      return costs.forward;
    case ActionKind::backward:
      return costs.backward_input + costs.backward_weight;
    case ActionKind::backward_input:
      return costs.backward_input;
    case ActionKind::backward_weight:
      return costs.backward_weight;
  }
  return 0;
}

// A time for each result; empty until it is known.
class ResultTimes {
 public:
  explicit ResultTimes(const PipelineSchedule& schedule)
      : micro_batches_(schedule.micro_batches),
        times_(2 * static_cast<size_t>(schedule.global_stages()) *
               static_cast<size_t>(schedule.micro_batches)) {}

  std::optional<double>& operator[](const PipelineResult& result) {
    const int64_t row = 2 * int64_t{result.global_stage} + (result.gradient ? 1 : 0);
    return times_[static_cast<size_t>(row * micro_batches_ + result.micro_batch)];
  }

 private:
  int64_t micro_batches_;
  std::vector<std::optional<double>> times_;
};

class Simulation {
 public:
  Simulation(const PipelineSchedule& schedule, const PipelineCosts& costs, PipelineSends sends)
      : schedule_(schedule), costs_(costs), ready_(schedule), awaited_(schedule) {
    spans_.resize(schedule.actions.size());
    if (sends == PipelineSends::buffered) return;
    for (int stage = 0; stage < schedule.stages; ++stage)
      for (int chunk = 0; chunk < schedule.virtual_stages; ++chunk)
        holders_.emplace_back(static_cast<size_t>(in_flight(schedule, stage, chunk)));
  }

  // Runs the stage's next action, unless it is at the end or has to wait.
  bool advance(int stage) {
    const auto& actions = schedule_.actions[static_cast<size_t>(stage)];
    auto& spans = spans_[static_cast<size_t>(stage)];
    if (spans.size() == actions.size()) return false;
    const PipelineAction& action = actions[spans.size()];
    const int g = schedule_.global_stage(stage, action.chunk);
    const std::optional<double> slot_free = slot_time(stage, action);
    if (!slot_free) return false;
    double start = std::max(*slot_free, spans.empty() ? 0 : spans.back().end);
    if (const std::optional<PipelineResult> result = needs(schedule_, stage, action)) {
      if (result->global_stage != g) awaited_[*result] = start;
      if (!ready_[*result]) return false;
      const bool local = result->global_stage % schedule_.stages == stage;
      start = std::max(start, *ready_[*result] + (local ? 0 : costs_.communication));
    }
    spans.push_back({start, start + cost(costs_, action.kind)});
    const bool gradient = action.kind != ActionKind::forward;
    if (action.kind != ActionKind::backward_weight)
      ready_[{gradient, g, action.micro_batch}] = spans.back().end;
    if (!gradient && !holders_.empty()) *holder(stage, action) = action.micro_batch;
    return true;
  }

  PipelineTimeline timeline() && {
    PipelineTimeline timeline;
    for (const auto& spans : spans_)
      if (!spans.empty()) timeline.makespan = std::max(timeline.makespan, spans.back().end);
    for (const auto& spans : spans_) {
      double busy = 0;
      for (const Span& span : spans) busy += span.end - span.start;
      timeline.bubble.push_back(busy > 0 ? (timeline.makespan - busy) / busy : 0);
    }
    timeline.spans = std::move(spans_);
    return timeline;
  }

 private:
  std::optional<int>* holder(int stage, const PipelineAction& action) {
    auto& slots = holders_[static_cast<size_t>(stage * schedule_.virtual_stages + action.chunk)];
    return &slots[static_cast<size_t>(action.micro_batch) % slots.size()];
  }

  // From when on an action may use its slot; empty while a result of the one before is in it.
  std::optional<double> slot_time(int stage, const PipelineAction& action) {
    if (holders_.empty() || action.kind != ActionKind::forward) return 0;
    const std::optional<int> before = *holder(stage, action);
    if (!before) return 0;
    const int g = schedule_.global_stage(stage, action.chunk);
    std::optional<double> output = 0, gradient = 0;
    if (g < schedule_.global_stages() - 1) output = awaited_[{false, g, *before}];
    if (g > 0 && schedule_.training) gradient = awaited_[{true, g, *before}];
    if (!output || !gradient) return std::nullopt;
    return std::max(*output, *gradient);
  }

  const PipelineSchedule& schedule_;
  const PipelineCosts& costs_;
  std::vector<std::vector<Span>> spans_;
  ResultTimes ready_;    // when its action ended
  ResultTimes awaited_;  // when its receiver came for it
  // The last micro-batch in each slot of each chunk of each stage. Empty if sends are buffered.
  std::vector<std::vector<std::optional<int>>> holders_;
};

std::string label(const PipelineSchedule& schedule, const PipelineAction& action) {
  const char letter = action.kind == ActionKind::forward           ? 'F'
                      : action.kind == ActionKind::backward_weight ? 'W'
                                                                   : 'B';
  std::string text = fmt::format("{}{}", letter, action.micro_batch);
  if (schedule.virtual_stages > 1) text += fmt::format(".{}", action.chunk);
  return text;
}

std::string draw_row(const PipelineSchedule& schedule, const std::vector<Span>& spans,
                     const std::vector<PipelineAction>& actions, size_t cell) {
  std::string row;
  size_t now = 0;
  const auto pad = [&](char fill, size_t width) { row.resize(std::max(row.size(), width), fill); };
  for (size_t i = 0; i < spans.size(); ++i) {
    for (; now < static_cast<size_t>(spans[i].start); ++now) {
      row += '.';
      pad(' ', (now + 1) * cell);
    }
    now = static_cast<size_t>(spans[i].end);
    row += label(schedule, actions[i]);
    if (spans[i].end - spans[i].start > 1) pad('-', now * cell - 1);
    pad(' ', now * cell);
  }
  if (spans.size() < actions.size()) row += label(schedule, actions[spans.size()]) + '?';
  row.erase(row.find_last_not_of(' ') + 1);
  return row;
}

}  // namespace

std::optional<PipelineResult> needs(const PipelineSchedule& schedule, int stage,
                                    const PipelineAction& action) {
  const int g = schedule.global_stage(stage, action.chunk), b = action.micro_batch;
  if (action.kind == ActionKind::forward) {
    if (g == 0) return std::nullopt;
    return PipelineResult{false, g - 1, b};
  }
  if (action.kind == ActionKind::backward_weight) return PipelineResult{true, g, b};
  if (g == schedule.global_stages() - 1) return PipelineResult{false, g, b};
  return PipelineResult{true, g + 1, b};
}

PipelineTimeline simulate(const PipelineSchedule& schedule, const PipelineCosts& costs,
                          PipelineSends sends) {
  Simulation simulation(schedule, costs, sends);
  for (bool moved = true; moved;) {
    moved = false;
    for (int stage = 0; stage < schedule.stages; ++stage)
      while (simulation.advance(stage)) moved = true;
  }
  return std::move(simulation).timeline();
}

std::string draw(const PipelineSchedule& schedule) {
  const PipelineTimeline timeline = simulate(schedule);
  size_t cell = 0;
  for (const auto& actions : schedule.actions)
    for (const PipelineAction& action : actions)
      cell = std::max(cell, label(schedule, action).size() + 1);
  const size_t number_width = std::to_string(schedule.stages - 1).size();
  std::string text;
  for (size_t stage = 0; stage < schedule.actions.size(); ++stage)
    text += fmt::format("stage {:{}}  {}\n", stage, number_width,
                        draw_row(schedule, timeline.spans[stage], schedule.actions[stage], cell));
  return text;
}

}  // namespace dstrain
