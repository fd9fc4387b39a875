#include "parallel/layout_run.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>

#include "core/backend/cpu_backend.h"
#include "parallel/thread_communicator.h"

namespace dstrain {
namespace {

// What the ranks of this process bring together.
struct Shared {
  std::mutex mutex;
  LayoutRun run;
  bool all_ranks_here = true;  // as threads
};

class RankRun {
 public:
  RankRun(const Config& config, const MeshShape& shape, const LayoutRunOptions& options,
          Communicator& world, Shared& shared)
      : config_(config),
        options_(options),
        shared_(shared),
        world_(world),
        backend_(options.make_backend ? options.make_backend(world.rank())
                                      : make_cpu_backend(options.threads)),
        device_ranks_(options.make_device_ranks ? options.make_device_ranks(world, *backend_)
                                                : nullptr),
        job_(config, shape, device_ranks_ ? *device_ranks_ : world, *backend_,
             node_name(world, options.nodes), /*training=*/true, options.fault.wrap),
        sequences_(config) {
    TrainEngine& engine = job_.engine();
    engine.allocate();
    engine.initialize(static_cast<uint64_t>(config.run.seed));
    if (options.at_start) options.at_start(engine);
    engine.set_progress(options.first_step, options.first_step);
    if (!options.record) return;
    tap_ = std::make_unique<RoutingTap>(config, job_.mesh().place(), *options.record,
                                        options.replay, *backend_);
    engine.set_routing_hook(tap_.get());
  }

  void run() {
    for (int64_t i = 0; i < options_.steps; ++i) {
      step(options_.first_step + i);
      if (i == 0) collect("adamw.exp_avg", shared_.run.first_moments);
    }
    collect("", shared_.run.state);
    exchange_state();
    {
      const std::scoped_lock lock(shared_.mutex);
      report();
      if (options_.at_end) options_.at_end(job_.engine());
    }
    if (!shared_.all_ranks_here) exchange_report();
  }

 private:
  static std::string node_name(const Communicator& world, int nodes) {
    return "machine " + std::to_string(world.rank() * nodes / world.size());
  }

  void step(int64_t number) {
    TrainEngine& engine = job_.engine();
    const AxisPlace& data = job_.mesh().place().data;
    const int64_t B = config_.train.micro_batch, G = config_.train.global_batch, first = number * G;
    const int64_t micro_batches = G / (B * data.size);
    if (tap_) tap_->begin_step(number);
    engine.begin_step(config_.optimizer.lr, sequences_.batch(first, G).valid_tokens());
    job_.runner().run([&](int64_t m) {
      SequenceBatch batch = sequences_.batch(first + (m * data.size + data.rank) * B, B);
      if (options_.fault.edit_batch) options_.fault.edit_batch(job_.mesh().place(), m, batch);
      engine.load(m, batch.view(), m == micro_batches - 1);
    });
    engine.finish_step();
    steps_.push_back(engine.take_result());
  }

  // Of all kinds where `kind` is empty.
  void collect(const std::string& kind, GatheredState& state) {
    std::vector<StateSlice> slices = job_.engine().saved_state();
    std::erase_if(slices,
                  [&](const StateSlice& slice) { return !kind.empty() && slice.kind != kind; });
    const std::scoped_lock lock(shared_.mutex);
    gather_state(job_.engine(), slices, state);
  }

  // From here on every rank sees what all have brought.
  void exchange_state() {
    if (shared_.all_ranks_here) return world_.barrier();
    share_state(world_, job_.engine().stream(), shared_.run.first_moments);
    share_state(world_, job_.engine().stream(), shared_.run.state);
  }

  // On a device, what the last update made may still be on its way to the ranks that copy it
  // (ParamStore::publish).
  void wait_for_copies() {
    TrainEngine& engine = job_.engine();
    if (config_.parallel.zero != 1 && config_.parallel.zero != 2) return;
    for (int chunk = 0; chunk < engine.num_chunks(); ++chunk) {
      std::set<int> blocks;
      for (const Parameter& p : engine.parameters(chunk).all())
        if (p.spec.trainable) blocks.insert(p.spec.block);
      for (const int block : blocks) {
        engine.store(chunk).acquire_finish(engine.dist_stream(), block);
        engine.store(chunk).release(engine.dist_stream(), block);
      }
    }
  }

  void report() {
    LayoutRun& run = shared_.run;
    wait_for_copies();
    const std::string copy =
        copy_difference(job_.engine(), job_.engine().loaded_state(), "param", run.state);
    if (run.disagreement.empty() && !copy.empty()) run.disagreement = copy;
    if (tap_) {
      run.flips.tokens += tap_->flips().tokens;
      run.flips.widest_margin = std::max(run.flips.widest_margin, tap_->flips().widest_margin);
    }
    if (run.steps.empty()) run.steps = steps_;
    for (size_t s = 0; s < steps_.size(); ++s)
      if (run.disagreement.empty() && !same_sums(steps_[s], run.steps[s]))
        run.disagreement = "the sums of step " + std::to_string(s + 1);
    if (world_.rank() == 0 || !shared_.all_ranks_here) run.traffic = job_.distribution().traffic();
  }

  void exchange_report() {
    LayoutRun& run = shared_.run;
    Stream& stream = job_.engine().stream();
    world_.all_reduce_sum(stream, Tensor(&run.flips.tokens, DType::i64, {1}));
    world_.all_reduce_max(stream, Tensor(&run.flips.widest_margin, DType::f64, {1}));
    for (const std::string& text : world_.all_gather_text(run.disagreement))
      if (run.disagreement.empty()) run.disagreement = text;
  }

  static bool same_sums(const StepResult& a, const StepResult& b) {
    return std::memcmp(&a.loss, &b.loss, sizeof a.loss) == 0 &&
           std::memcmp(&a.grad_norm, &b.grad_norm, sizeof a.grad_norm) == 0 &&
           a.expert_counts_LE == b.expert_counts_LE;
  }

  Config config_;
  LayoutRunOptions options_;
  Shared& shared_;
  Communicator& world_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> device_ranks_;
  RankJob job_;
  RandomSequences sequences_;
  std::unique_ptr<RoutingTap> tap_;
  std::vector<StepResult> steps_;
};

LayoutRun finished(LayoutRun run, const MeshShape& shape, const LayoutRunOptions& options,
                   std::chrono::steady_clock::time_point begin) {
  run.shape = shape;
  run.replayed = options.record && options.replay;
  run.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  require_whole(run.first_moments);
  require_whole(run.state);
  return run;
}

}  // namespace

LayoutRun run_layout(const Config& config, const MeshShape& shape,
                     const LayoutRunOptions& options) {
  Shared shared;
  const auto begin = std::chrono::steady_clock::now();
  run_rank_threads(
      static_cast<int>(shape.ranks()),
      [&](Communicator& world) { RankRun(config, shape, options, world, shared).run(); },
      {options.timeout});
  return finished(std::move(shared.run), shape, options, begin);
}

LayoutRun run_layout_on(Communicator& world, const Config& config, const MeshShape& shape,
                        const LayoutRunOptions& options) {
  Shared shared;
  shared.all_ranks_here = false;
  const auto begin = std::chrono::steady_clock::now();
  RankRun(config, shape, options, world, shared).run();
  return finished(std::move(shared.run), shape, options, begin);
}

}  // namespace dstrain
