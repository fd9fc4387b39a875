// Runs a pipeline schedule on this rank's engine: receives, computes, sends. With one stage nothing is
// sent, and a step is each micro-batch forward, then backward.
#pragma once

#include <functional>
#include <vector>

#include "core/dist/communicator.h"
#include "core/engine/train_engine.h"
#include "parallel/exposed_time.h"
#include "parallel/pipeline_schedule.h"

namespace dstrain {

// The engine's side of a schedule: how many micro-batches its chunks and inputs have to hold. The first and
// last layers of the chunks are set by the caller.
void fit_engine(const PipelineSchedule& schedule, int stage, EngineOptions& options);

class PipelineRunner {
 public:
  // `pipeline`: the ranks with the same place in all stages, in order; all of them call this. All outlive the
  // runner.
  PipelineRunner(TrainEngine& engine, const PipelineSchedule& schedule, Communicator& pipeline,
                 ExposedTime& exposed);

  // Loads micro-batch m into the engine (TrainEngine::load). Called once for each, in order, before it is
  // first needed.
  using LoadMicroBatch = std::function<void(int64_t m)>;
  // Everything between engine.begin_step() and finish_step().
  void run(const LoadMicroBatch& load);
  // Between engine.begin_evaluation() and finish_evaluation(): micro_batches forward only.
  void evaluate(int64_t micro_batches, const LoadMicroBatch& load);

 private:
  void run_actions(const PipelineSchedule& schedule, const LoadMicroBatch& load);
  void forward(const PipelineSchedule& schedule, const PipelineAction& action);
  void backward(const PipelineAction& action);
  void send(const Tensor& x, int to);
  void receive(const Tensor& x, int from);
  int neighbour(int step) const;
  bool is_first(int chunk) const { return schedule_.global_stage(stage_, chunk) == 0; }
  bool is_last(int chunk) const {
    return schedule_.global_stage(stage_, chunk) == schedule_.global_stages() - 1;
  }

  TrainEngine& engine_;
  PipelineSchedule schedule_;
  int stage_;
  Communicator& pipeline_;
  ExposedTime& exposed_;
  // What was last sent from the slots, by chunk and slot: it has to have left before the slot is used again.
  struct Sent {
    Tensor out_tD, dx_in_tD;
  };
  Sent& sent_from(int chunk, int64_t m);
  std::vector<std::vector<Sent>> sent_;
};

}  // namespace dstrain
