#include "parallel/pipeline_schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/base/error.h"

namespace dstrain {
namespace {

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

bool PipelineSchedule::splits_backward() const {
  const auto is_part = [](const PipelineAction& a) { return a.kind == ActionKind::backward_input; };
  return std::any_of(actions.begin(), actions.end(), [&](const auto& of_stage) {
    return std::any_of(of_stage.begin(), of_stage.end(), is_part);
  });
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
        "parallel.schedule interleaved over {} stages takes a multiple of {} micro-batches a step, "
        "not {}: change train.global_batch, or write parallel.schedule: 1f1b",
        stages, stages, micro_batches));
  if (stages == 1) {
    // Nobody to wait for, so each micro-batch goes through all chunks and back.
    auto& actions = schedule.actions[0];
    for (int b = 0; b < micro_batches; ++b) {
      for (int c = 0; c < virtual_stages; ++c) actions.push_back({ActionKind::forward, c, b});
      for (int c = virtual_stages; c-- > 0;) actions.push_back({ActionKind::backward, c, b});
    }
    return schedule;
  }
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
  if (stages == 1) return make_one_f_one_b(stages, micro_batches);
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

PipelineSchedule make_pipeline_schedule(PipelineOrder order, int stages, int virtual_stages,
                                        int micro_batches) {
  if (order == PipelineOrder::interleaved)
    return make_interleaved(stages, virtual_stages, micro_batches);
  if (virtual_stages != 1)
    throw ConfigError(
        fmt::format("parallel.schedule {} takes 1 virtual stage, not {}: write 1 under "
                    "parallel.virtual_stages, or parallel.schedule: interleaved",
                    enum_name(order), virtual_stages));
  return order == PipelineOrder::zero_bubble ? make_zero_bubble(stages, micro_batches)
                                             : make_one_f_one_b(stages, micro_batches);
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
