#include "test/support/trainer_rank.h"

#include "core/checkpoint/state_boxes.h"

namespace dstrain::test {

TrainerRank::TrainerRank(const Config& config, const MeshShape& shape, Communicator& ranks,
                         Backend& backend, const std::string& node)
    : config_(config),
      backend_(backend),
      job_(config, shape, ranks, backend, node, /*training=*/true),
      sequences_(config) {
  job_.engine().allocate();
  job_.engine().initialize(static_cast<uint64_t>(config.run.seed));
}

TrainerRun TrainerRank::run() {
  constexpr int kSteps = 3;
  TrainerRun run;
  for (int step = 0; step < kSteps; ++step) {
    if (step == 1) copy_state(run.snapshot);
    queue_step(step);
    if (step > 0) run.steps.push_back(job_.engine().take_result());
    if (step == 1) run.evaluation = evaluate();
  }
  run.steps.push_back(job_.engine().take_result());
  copied_->synchronize();
  return run;
}

template <class Run>
void TrainerRank::micro_batches(int64_t number, const Run& run) {
  const AxisPlace& data = job_.mesh().place().data;
  const int64_t B = config_.train.micro_batch, G = config_.train.global_batch;
  const int64_t count = G / (B * data.size);
  run(count, [this, &data, B, first = number * G, count](int64_t m) {
    job_.engine().load(m, sequences_.batch(first + (m * data.size + data.rank) * B, B).view(),
                       m == count - 1);
  });
}

void TrainerRank::queue_step(int64_t number) {
  const int64_t G = config_.train.global_batch;
  job_.exposed().begin_step();
  job_.engine().begin_step(config_.optimizer.lr, sequences_.batch(number * G, G).valid_tokens());
  micro_batches(number, [&](int64_t, const auto& load) { job_.runner().run(load); });
  job_.engine().finish_step();
  job_.exposed().end_step();
  if (number > 0) job_.exposed().take();
}

double TrainerRank::evaluate() {
  constexpr int64_t kBatch = 7;
  job_.engine().begin_evaluation();
  micro_batches(kBatch,
                [&](int64_t count, const auto& load) { job_.runner().evaluate(count, load); });
  return job_.engine().finish_evaluation();
}

void TrainerRank::copy_state(std::vector<std::vector<char>>& snapshot) {
  TrainEngine& engine = job_.engine();
  state_copy_.emplace(backend_, engine.copy_chunks_2N());
  const std::vector<StateTensor> tensors = state_tensors(engine.saved_state());
  std::vector<void*> places;
  for (const StateTensor& tensor : tensors) {
    snapshot.emplace_back(static_cast<size_t>(tensor.bytes()));
    places.push_back(snapshot.back().data());
  }
  engine.begin_state_copy(state_copy_->stream());
  copied_ = &state_copy_->queue(tensors, places);
  engine.hold_state(*copied_);
}

}  // namespace dstrain::test
