// When the actions of a pipeline schedule would run, given what each kind costs; and its picture.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "parallel/pipeline_schedule.h"

namespace dstrain {

// Times of one action, in any unit. A chunk costs the same on every stage.
struct PipelineCosts {
  double forward = 1;
  double backward_input = 1;
  double backward_weight = 1;
  double communication = 0;  // from the end of an action to its result being on another stage
};

struct PipelineTimeline {
  struct Span {
    double start = 0, end = 0;
  };
  // Of each stage, parallel to its actions. Shorter where a stage waits for ever.
  std::vector<std::vector<Span>> spans;
  double makespan = 0;
  // Of each stage: idle time over computing time.
  std::vector<double> bubble;
};

// Where a result is until the receiver comes for it. A send never waits, but a slot may.
enum class PipelineSends {
  buffered,  // in memory of the transport
  in_place,  // in its slot: the slot's next forward waits until both results are being received
};

// Every stage runs its actions in order, each as soon as what it needs is there. Sends take no time
// of the sender. Chunks and micro-batches must be in range; other mistakes of a schedule end in a
// stage that waits for ever.
PipelineTimeline simulate(const PipelineSchedule& schedule, const PipelineCosts& costs = {},
                          PipelineSends sends = PipelineSends::buffered);

// What an action leaves for others: a chunk's output, or the gradient of a chunk's input.
struct PipelineResult {
  bool gradient = false;
  int global_stage = 0;
  int micro_batch = 0;
  bool operator==(const PipelineResult&) const = default;
};

// The result that an action needs; none for a forward of the first global stage. When the
// gradient of the next global stage is there, a backward's own forward is done, too.
std::optional<PipelineResult> needs(const PipelineSchedule& schedule, int stage,
                                    const PipelineAction& action);

// One row per stage, time to the right with the default costs, for a terminal:
//   stage 0  F0 F1 .  .  B0--- .  B1---
//   stage 1  .  F0 B0--- F1 B1---
// F, B, W and a micro-batch: forward, backward or backward_input, backward_weight; F0.1 is chunk 1,
// where there are several. A '.' is an idle unit. One that waits for ever ends its row: "F0?".
std::string draw(const PipelineSchedule& schedule);

}  // namespace dstrain
