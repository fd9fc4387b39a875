#include "parallel/pipeline_runner.h"

#include <algorithm>

namespace dstrain {

void fit_engine(const PipelineSchedule& schedule, int stage, EngineOptions& options) {
  DSTRAIN_CHECK(std::ssize(options.chunks) == schedule.virtual_stages, "a chunk for each virtual stage");
  for (int chunk = 0; chunk < schedule.virtual_stages; ++chunk)
    options.chunks[static_cast<size_t>(chunk)].in_flight = in_flight(schedule, stage, chunk);
  options.loaded_batches = batches_in_flight(schedule, stage);
  options.split_backward = schedule.splits_backward();
}

PipelineRunner::PipelineRunner(TrainEngine& engine, const PipelineSchedule& schedule,
                               Communicator& pipeline, ExposedTime& exposed)
    : engine_(engine),
      schedule_(schedule),
      stage_(pipeline.rank()),
      pipeline_(pipeline),
      exposed_(exposed) {
  DSTRAIN_CHECK(schedule.stages == pipeline.size(), "a stage for each rank of the pipeline");
  for (const EngineChunk& chunk : engine.options().chunks)
    sent_.emplace_back(static_cast<size_t>(chunk.in_flight));
  pipeline.prepare(Connections::messages);
}

PipelineRunner::Sent& PipelineRunner::sent_from(int chunk, int64_t m) {
  std::vector<Sent>& slots = sent_[static_cast<size_t>(chunk)];
  return slots[static_cast<size_t>(m) % slots.size()];
}

// The rank of the stage before (-1) or after (+1) this one; chunks go on from the last stage to the first.
int PipelineRunner::neighbour(int step) const {
  return (stage_ + step + schedule_.stages) % schedule_.stages;
}

void PipelineRunner::run(const LoadMicroBatch& load) { run_actions(schedule_, load); }

void PipelineRunner::evaluate(int64_t micro_batches, const LoadMicroBatch& load) {
  run_actions(make_forward_only(schedule_.stages, schedule_.virtual_stages, static_cast<int>(micro_batches)),
              load);
}

void PipelineRunner::run_actions(const PipelineSchedule& schedule, const LoadMicroBatch& load) {
  int loaded = 0;
  for (const PipelineAction& action : schedule.actions[static_cast<size_t>(stage_)]) {
    for (; loaded <= action.micro_batch; ++loaded) load(loaded);
    switch (action.kind) {
      case ActionKind::forward:
        forward(schedule, action);
        break;
      case ActionKind::backward:
      case ActionKind::backward_input:
        backward(action);
        break;
      case ActionKind::backward_weight:
        engine_.backward_weight(action.chunk, action.micro_batch);
        break;
    }
  }
  if (pipeline_.size() == 1) return;
  exposed_.on_computing(CommKind::pipeline, engine_.stream(),
                        [&] { pipeline_.wait_sends(engine_.stream()); });
}

// A send holds up nothing but a CPU, whose time it takes.
void PipelineRunner::send(const Tensor& x, int to) {
  exposed_.beside(CommKind::pipeline, engine_.stream(),
                  [&] { pipeline_.send(engine_.stream(), x, to); });
}

void PipelineRunner::receive(const Tensor& x, int from) {
  exposed_.on_computing(CommKind::pipeline, engine_.stream(),
                        [&] { pipeline_.recv(engine_.stream(), x, from); });
}

void PipelineRunner::forward(const PipelineSchedule& schedule, const PipelineAction& action) {
  const Pass pass = schedule.training ? Pass::training : Pass::evaluation;
  Stream& stream = engine_.stream();
  Sent& sent = sent_from(action.chunk, action.micro_batch);
  for (Tensor* x : {&sent.out_tD, &sent.dx_in_tD}) {
    if (x->defined())
      exposed_.on_computing(CommKind::pipeline, stream, [&] { pipeline_.wait_send(stream, *x); });
    *x = {};
  }
  Tensor x_in;
  if (!is_first(action.chunk)) {
    x_in = engine_.receive_buffer(action.chunk, action.micro_batch, false);
    receive(x_in, neighbour(-1));
  }
  const Tensor out = engine_.forward(action.chunk, action.micro_batch, x_in, pass);
  if (is_last(action.chunk)) return;
  send(out, neighbour(+1));
  sent.out_tD = out;
}

void PipelineRunner::backward(const PipelineAction& action) {
  const int64_t m = action.micro_batch;
  Tensor dx_out;
  if (!is_last(action.chunk)) {
    dx_out = engine_.receive_buffer(action.chunk, m, true);
    receive(dx_out, neighbour(+1));
  }
  const Tensor dx_in = action.kind == ActionKind::backward ? engine_.backward(action.chunk, m, dx_out)
                                                           : engine_.backward_input(action.chunk, m, dx_out);
  if (is_first(action.chunk)) return;
  send(dx_in, neighbour(-1));
  sent_from(action.chunk, m).dx_in_tD = dx_in;
}

}  // namespace dstrain
