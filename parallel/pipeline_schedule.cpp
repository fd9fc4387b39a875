#include "parallel/pipeline_schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr auto kNames = std::to_array<std::pair<std::string_view, PipelineScheduleName>>({
    {"1f1b", PipelineScheduleName::one_f_one_b},
    {"interleaved", PipelineScheduleName::interleaved},
    {"zero_bubble", PipelineScheduleName::zero_bubble},
    {"forward_only", PipelineScheduleName::forward_only},
});

PipelineSchedule without_actions(int stages, int virtual_stages, int micro_batches) {
  if (stages < 1 || virtual_stages < 1 || micro_batches < 1)
    throw ConfigError(
        fmt::format("a pipeline schedule needs at least 1 stage, 1 chunk per stage and 1 "
                    "micro-batch, not {}, {} and {}",
                    stages, virtual_stages, micro_batches));
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
  if (int64_t{stages} * virtual_stages > kMost || int64_t{micro_batches} * virtual_stages > kMost)
    throw ConfigError(
        fmt::format("a pipeline of {} stages with {} chunks each and {} micro-batches "
                    "is too large to be scheduled",
                    stages, virtual_stages, micro_batches));
  PipelineSchedule schedule;
  schedule.stages = stages;
  schedule.virtual_stages = virtual_stages;
  schedule.micro_batches = micro_batches;
  schedule.actions.resize(static_cast<size_t>(stages));
  return schedule;
}

// The pattern of every training schedule: forwards to fill the pipeline, then forward and backward
// in turn, then the backwards that are left. Both are called with 0 .. total - 1, in this order.
void alternate(int total, int64_t warm_up, auto forward, auto backward) {
  const int ahead = static_cast<int>(std::min<int64_t>(warm_up, total));
  for (int k = 0; k < ahead; ++k) forward(k);
  for (int k = 0; k < total; ++k) {
    if (k < total - ahead) forward(ahead + k);
    backward(k);
  }
}

}  // namespace

bool PipelineSchedule::frees_slot(const PipelineAction& action) const {
  if (!training) return action.kind == ActionKind::forward;
  return action.kind == ActionKind::backward || action.kind == ActionKind::backward_weight;
}

PipelineSchedule make_one_f_one_b(int stages, int micro_batches) {
  PipelineSchedule schedule = without_actions(stages, 1, micro_batches);
  for (int p = 0; p < stages; ++p) {
    auto& actions = schedule.actions[static_cast<size_t>(p)];
    alternate(
        micro_batches, stages - 1 - p,
        [&](int k) {
          actions.push_back({ActionKind::forward, 0, k});
        },
        [&](int k) {
          actions.push_back({ActionKind::backward, 0, k});
        });
  }
  return schedule;
}

PipelineSchedule make_interleaved(int stages, int virtual_stages, int micro_batches) {
  if (virtual_stages == 1) return make_one_f_one_b(stages, micro_batches);
  PipelineSchedule schedule = without_actions(stages, virtual_stages, micro_batches);
  if (micro_batches % stages != 0)
    throw ConfigError(fmt::format(
        "the interleaved pipeline schedule over {} stages takes a multiple of {} micro-batches a "
        "step, not {}: change the batch sizes, or take the schedule 1f1b with 1 virtual stage",
        stages, stages, micro_batches));
  // Groups of `stages` micro-batches pass through all chunks before the next group starts.
  const int in_group = stages * virtual_stages;
  const auto chunk = [&](int k) { return k % in_group / stages; };
  const auto micro_batch = [&](int k) { return k / in_group * stages + k % stages; };
  for (int p = 0; p < stages; ++p) {
    auto& actions = schedule.actions[static_cast<size_t>(p)];
    // The first gradient comes back to stage p after stages - 1 - p stages, there and back.
    const int64_t warm_up = int64_t{virtual_stages - 1} * stages + 2 * int64_t{stages - 1 - p};
    alternate(
        micro_batches * virtual_stages, warm_up,
        [&](int k) {
          actions.push_back({ActionKind::forward, chunk(k), micro_batch(k)});
        },
        [&](int k) {
          const int last_first = virtual_stages - 1 - chunk(k);
          actions.push_back({ActionKind::backward, last_first, micro_batch(k)});
        });
  }
  return schedule;
}

PipelineSchedule make_zero_bubble(int stages, int micro_batches) {
  PipelineSchedule schedule = without_actions(stages, 1, micro_batches);
  for (int p = 0; p < stages; ++p) {
    auto& actions = schedule.actions[static_cast<size_t>(p)];
    const auto weight = [&](int k) { actions.push_back({ActionKind::backward_weight, 0, k}); };
    alternate(
        micro_batches, stages - 1 - p,
        [&](int k) {
          actions.push_back({ActionKind::forward, 0, k});
        },
        [&](int k) {
          actions.push_back({ActionKind::backward_input, 0, k});
          if (k >= p) weight(k - p);
        });
    for (int k = std::max(0, micro_batches - p); k < micro_batches; ++k) weight(k);
  }
  return schedule;
}

PipelineSchedule make_forward_only(int stages, int virtual_stages, int micro_batches) {
  PipelineSchedule schedule = without_actions(stages, virtual_stages, micro_batches);
  schedule.training = false;
  // In groups as in make_interleaved; the last one may be smaller.
  for (auto& actions : schedule.actions)
    for (int first = 0; first < micro_batches; first += stages)
      for (int chunk = 0; chunk < virtual_stages; ++chunk)
        for (int b = first; b < std::min(first + stages, micro_batches); ++b)
          actions.push_back({ActionKind::forward, chunk, b});
  return schedule;
}

PipelineScheduleName pipeline_schedule_from_name(std::string_view name) {
  std::string known;
  for (const auto& [text, value] : kNames) {
    if (text == name) return value;
    if (!known.empty()) known += text == kNames.back().first ? " and " : ", ";
    known += text;
  }
  throw ConfigError(
      fmt::format("there is no pipeline schedule '{}'; the schedules are {}", name, known));
}

PipelineSchedule make_pipeline_schedule(PipelineScheduleName name, int stages, int virtual_stages,
                                        int micro_batches) {
  if (name == PipelineScheduleName::interleaved)
    return make_interleaved(stages, virtual_stages, micro_batches);
  if (name == PipelineScheduleName::forward_only)
    return make_forward_only(stages, virtual_stages, micro_batches);
  const bool split = name == PipelineScheduleName::zero_bubble;
  if (virtual_stages != 1)
    throw ConfigError(
        fmt::format("the pipeline schedule {} has 1 virtual stage, not {}: take the "
                    "schedule interleaved, or 1 virtual stage",
                    split ? "zero_bubble" : "1f1b", virtual_stages));
  return split ? make_zero_bubble(stages, micro_batches) : make_one_f_one_b(stages, micro_batches);
}

int in_flight(const PipelineSchedule& schedule, int stage, int chunk) {
  int now = 0, most = 0;
  for (const PipelineAction& action : schedule.actions.at(static_cast<size_t>(stage))) {
    if (action.chunk != chunk) continue;
    if (action.kind == ActionKind::forward) most = std::max(most, ++now);
    if (schedule.frees_slot(action)) --now;
  }
  return most;
}

int batches_in_flight(const PipelineSchedule& schedule, int stage) {
  std::vector<int> chunks_left(static_cast<size_t>(schedule.micro_batches),
                               schedule.virtual_stages);
  int lowest = 0, highest = -1, widest = 0;
  for (const PipelineAction& action : schedule.actions.at(static_cast<size_t>(stage))) {
    if (action.kind == ActionKind::forward) {
      highest = std::max(highest, action.micro_batch);
      widest = std::max(widest, highest - lowest + 1);
    }
    if (!schedule.frees_slot(action)) continue;
    --chunks_left.at(static_cast<size_t>(action.micro_batch));
    while (lowest < schedule.micro_batches && chunks_left[static_cast<size_t>(lowest)] == 0)
      ++lowest;
  }
  return widest;
}

}  // namespace dstrain
