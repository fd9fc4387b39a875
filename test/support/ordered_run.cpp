#include "test/support/ordered_run.h"

#include <fmt/format.h>

#include <mutex>
#include <optional>

#include "core/checkpoint/state_boxes.h"
#include "core/checkpoint/state_copy.h"
#include "parallel/random_sequences.h"
#include "parallel/rank_job.h"
#include "parallel/thread_communicator.h"

namespace dstrain::test {
namespace {

class OrderedRank {
 public:
  OrderedRank(const Config& config, const MeshShape& shape, Communicator& world,
              const std::set<OrderedBackend::Wait>& left_out, const std::string& node)
      : config_(config),
        backend_(world.rank() == 0 ? left_out : std::set<OrderedBackend::Wait>()),
        ranks_(world, backend_),
        job_(config, shape, ranks_, backend_, node, /*training=*/true),
        sequences_(config) {
    job_.engine().allocate();
    job_.engine().initialize(static_cast<uint64_t>(config.run.seed));
  }

  void run() {
    constexpr int kSteps = 3;
    for (int step = 0; step < kSteps; ++step) {
      if (step == 1) copy_state();
      queue_step(step);
      if (step > 0) job_.engine().take_result();
      if (step == 1) evaluate();
    }
    job_.engine().take_result();
    copied_->synchronize();
  }
  OrderedBackend& backend() { return backend_; }

 private:
  // The global batch `number` by micro-batches.
  template <class Run>
  void micro_batches(int64_t number, const Run& run) {
    const AxisPlace& data = job_.mesh().place().data;
    const int64_t B = config_.train.micro_batch, G = config_.train.global_batch;
    const int64_t count = G / (B * data.size);
    run(count, [this, &data, B, first = number * G, count](int64_t m) {
      job_.engine().load(m, sequences_.batch(first + (m * data.size + data.rank) * B, B).view(),
                         m == count - 1);
    });
  }

  void queue_step(int64_t number) {
    const int64_t G = config_.train.global_batch;
    job_.exposed().begin_step();
    job_.engine().begin_step(config_.optimizer.lr, sequences_.batch(number * G, G).valid_tokens());
    micro_batches(number, [&](int64_t, const auto& load) { job_.runner().run(load); });
    job_.engine().finish_step();
    job_.exposed().end_step();
    if (number > 0) job_.exposed().take();
  }

  void evaluate() {
    job_.engine().begin_evaluation();
    micro_batches(7, [&](int64_t count, const auto& load) { job_.runner().evaluate(count, load); });
    job_.engine().finish_evaluation();
  }

  void copy_state() {
    TrainEngine& engine = job_.engine();
    state_copy_.emplace(backend_, engine.copy_chunks_2N());
    const std::vector<StateTensor> tensors = state_tensors(engine.saved_state());
    std::vector<void*> places;
    for (const StateTensor& tensor : tensors) {
      snapshot_.emplace_back(static_cast<size_t>(tensor.bytes()));
      places.push_back(snapshot_.back().data());
    }
    engine.begin_state_copy(state_copy_->stream());
    copied_ = &state_copy_->queue(tensors, places);
    engine.hold_state(*copied_);
  }

  const Config& config_;
  OrderedBackend backend_;
  OrderedCommunicator ranks_;
  RankJob job_;
  RandomSequences sequences_;
  std::optional<StateCopy> state_copy_;
  std::vector<std::vector<char>> snapshot_;
  Event* copied_ = nullptr;
};

}  // namespace

OrderedRun run_ordered(const Config& config, const MeshShape& shape,
                       const std::set<OrderedBackend::Wait>& left_out, int nodes) {
  OrderedRun run;
  std::mutex mutex;
  run_rank_threads(static_cast<int>(shape.ranks()), [&](Communicator& world) {
    const int node = world.rank() * nodes / world.size();
    OrderedRank rank(config, shape, world, left_out, fmt::format("machine {}", node));
    rank.run();
    const std::lock_guard lock(mutex);
    for (const std::string& conflict : rank.backend().order().conflicts())
      run.conflicts.insert(conflict);
    if (world.rank() != 0) return;
    run.waits = rank.backend().waits();
    run.calls = rank.backend().order().calls();
  });
  return run;
}

}  // namespace dstrain::test
