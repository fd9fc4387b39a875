// Pipeline schedules as data: for each stage the order in which it runs forward and backward of its
// micro-batches. They are tested and drawn without a device or a message.
//
// A stage is a rank of the pipeline axis. The model is cut into stages * virtual_stages chunks of
// layers, its global stages; stage p holds the global stages chunk * stages + p. The output of
// global stage g goes to g + 1, the gradient of its input to g - 1.
#pragma once

#include <vector>

#include "core/config/parallel_config.h"

namespace dstrain {

enum class ActionKind {
  forward,
  backward,         // both of the following
  backward_input,   // gradient of the chunk's input
  backward_weight,  // gradients of its weights; after backward_input
};

struct PipelineAction {
  ActionKind kind = ActionKind::forward;
  int chunk = 0;  // of this stage: 0 .. virtual_stages - 1
  int micro_batch = 0;
  bool operator==(const PipelineAction&) const = default;
};

struct PipelineSchedule {
  int stages = 1;
  int virtual_stages = 1;  // chunks per stage
  int micro_batches = 1;
  bool training = true;  // false: every micro-batch goes forward only

  std::vector<std::vector<PipelineAction>> actions;  // of each stage, in the order it runs them

  int global_stages() const { return stages * virtual_stages; }
  int global_stage(int stage, int chunk) const { return chunk * stages + stage; }
  // True for the action after which nothing of its chunk's micro-batch is needed any more.
  bool frees_slot(const PipelineAction& action) const;
  bool splits_backward() const;  // true if any backward runs in two actions
};

// All makers throw ConfigError for counts below 1 and for combinations that their schedule
// excludes. What they return passes check() of pipeline_schedule_check.h. With one stage all
// training schedules are the same: each micro-batch forward, then backward.

// One forward, one backward in turn after a warm-up (PipeDream-Flush, arXiv:2006.09503). Stage p
// holds at most stages - p micro-batches. Idle time over computing time is
// (stages - 1) / micro_batches.
PipelineSchedule make_one_f_one_b(int stages, int micro_batches);

// The same over several chunks per stage (arXiv:2104.04473, section 2.2): the idle time shrinks by
// virtual_stages, messages grow by as much. micro_batches is a multiple of stages, unless there is
// one chunk per stage: that is make_one_f_one_b.
PipelineSchedule make_interleaved(int stages, int virtual_stages, int micro_batches);

// ZB-H1 (arXiv:2401.10241): weight gradients are computed apart and later, on stage p by p
// micro-batches, so that input gradients travel without waiting for them. A third of the idle time
// of 1F1B where the three kinds of work cost the same and micro_batches >= stages. Every stage
// holds up to `stages` micro-batches, which in 1F1B only the first does.
PipelineSchedule make_zero_bubble(int stages, int micro_batches);

// For evaluation; any number of micro-batches.
PipelineSchedule make_forward_only(int stages, int virtual_stages, int micro_batches);

// The training schedule of that order. Throws ConfigError where the order has one chunk per stage
// and virtual_stages is not 1.
PipelineSchedule make_pipeline_schedule(PipelineOrder order, int stages, int virtual_stages,
                                        int micro_batches);

// Memory that a schedule asks for; both expect one that check() accepts.
//
// The largest number of micro-batches of a chunk whose forward began and whose last backward has
// not ended: its activation slots. Micro-batch b uses slot b % in_flight.
int in_flight(const PipelineSchedule& schedule, int stage, int chunk);
// The widest window of micro-batches on a stage, over its chunks: from the lowest unfinished one to
// the highest that began. Micro-batch b can keep its tokens in place b % batches_in_flight.
int batches_in_flight(const PipelineSchedule& schedule, int stage);

// Messages that a stage may have on their way to another; one more waits until one is received, and
// may hold up what comes after it. With fewer, stages of interleaved schedules can wait for each
// other for ever; two stages send each other what more of them send to two neighbours.
constexpr int messages_under_way(int stages) {
  return stages == 2 ? 3 : 2;
}

}  // namespace dstrain
