#include "parallel/pipeline_schedule_timeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>

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

// When each result was ready; empty until then.
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

// The time from which what an action needs is on its stage; none while it is missing.
std::optional<double> ready_time(const PipelineSchedule& schedule, const PipelineCosts& costs,
                                 ResultTimes& times, int stage, const PipelineAction& action) {
  const std::optional<PipelineResult> result = needs(schedule, stage, action);
  if (!result) return 0;
  const std::optional<double> time = times[*result];
  const bool local = result->global_stage % schedule.stages == stage;
  return time && !local ? *time + costs.communication : time;
}

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

PipelineTimeline simulate(const PipelineSchedule& schedule, const PipelineCosts& costs) {
  PipelineTimeline timeline;
  timeline.spans.resize(schedule.actions.size());
  ResultTimes times(schedule);
  for (bool moved = true; moved;) {
    moved = false;
    for (int stage = 0; stage < schedule.stages; ++stage) {
      const auto& actions = schedule.actions[static_cast<size_t>(stage)];
      auto& spans = timeline.spans[static_cast<size_t>(stage)];
      while (spans.size() < actions.size()) {
        const PipelineAction& action = actions[spans.size()];
        const auto ready = ready_time(schedule, costs, times, stage, action);
        if (!ready) break;
        const double start = std::max(*ready, spans.empty() ? 0 : spans.back().end);
        spans.push_back({start, start + cost(costs, action.kind)});
        if (action.kind != ActionKind::backward_weight)
          times[{action.kind != ActionKind::forward, schedule.global_stage(stage, action.chunk),
                 action.micro_batch}] = spans.back().end;
        timeline.makespan = std::max(timeline.makespan, spans.back().end);
        moved = true;
      }
    }
  }
  for (const auto& spans : timeline.spans) {
    double busy = 0;
    for (const Span& span : spans) busy += span.end - span.start;
    timeline.bubble.push_back(busy > 0 ? (timeline.makespan - busy) / busy : 0);
  }
  return timeline;
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
