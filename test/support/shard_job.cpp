#include "test/support/shard_job.h"

#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "core/backend/cpu_backend.h"
#include "core/base/bf16.h"
#include "core/base/rng.h"
#include "core/checkpoint/state_boxes.h"
#include "core/checkpoint/state_copy.h"
#include "core/dist/local.h"
#include "core/engine/parameter_io.h"
#include "core/optim/adamw.h"
#include "test/support/master_ops.h"

namespace dstrain::test {
namespace {

constexpr int kBlocks = 7;  // 0 embedding, 1-4 and 6 layers, 5 head
constexpr double kLr = 0.01;

OptimizerConfig optimizer_of(const ShardJob& job) {
  OptimizerConfig config;
  config.weight_decay = 0.3;
  config.grad_clip = job.clip;
  return config;
}

uint64_t name_id(const Parameter& p) {
  return stream_id(p.spec.name.data(), p.spec.name.size());
}

// Half of what a rank's micro-batch adds to the gradient of an element; layers add it twice.
float half_gradient(const ShardJob& job, int step, int micro, int world_rank, const Parameter& p,
                    int64_t local) {
  const uint64_t key = static_cast<uint64_t>((step * 64 + micro) * 64 + world_rank) * 1000003 +
                       static_cast<uint64_t>(p.global_index(local));
  if (!job.exact) return static_cast<float>(random_normal(7, name_id(p), key));
  return static_cast<float>(static_cast<int>(random_u64(7, name_id(p), key) % 17) - 8) / 8;
}

// Some parameters get nothing in a step, or in a micro-batch.
bool contributes(const Parameter& p, int step, int micro) {
  if (p.spec.name == "gate.2") return step % 2 == 0;
  if (p.spec.name == "down.1") return micro == 0;
  return true;
}

bool comes_early(const Parameter& p) {
  return p.spec.shape.size() == 1;
}  // of a split backward

bool adds_shards(const ShardJob& job) {
  return job.zero >= 2 && !job.keep_full_grads;
}

ShardPlace shard_place(const RankPlace& place) {
  return {place.tensor, place.expert};
}

ParameterSet& parameters_of_rank(ParameterSet& set, const ShardJob& job, int world_rank) {
  declare_shard_job(set, job, place_of(job.shape, world_rank));
  set.finish_layout();
  return set;
}

// Gradients by name, global; sums over the ranks of a stage in rank order, then over stages.
class ReferenceGradients {
 public:
  explicit ReferenceGradients(const ShardJob& job) : job_(job) {
    for (int r = 0; r < job.shape.ranks(); ++r) parameters_of_rank(ranks_.emplace_back(), job, r);
  }

  GlobalState of_step(int step) const {
    GlobalState sum;
    const int stage_ranks = static_cast<int>(job_.shape.stage_ranks());
    for (int stage = 0; stage < job_.shape.pipeline; ++stage) {
      GlobalState of_stage;
      if (!adds_shards(job_)) {
        for (int r = 0; r < stage_ranks; ++r)
          add_rank(of_stage, step, 0, job_.micro_batches, stage * stage_ranks + r);
      } else {
        for (int m = 0; m < job_.micro_batches; ++m) {
          GlobalState of_micro;
          for (int r = 0; r < stage_ranks; ++r)
            add_rank(of_micro, step, m, m + 1, stage * stage_ranks + r);
          add(of_stage, of_micro);
        }
      }
      add(sum, of_stage);
    }
    return sum;
  }

 private:
  static void add(GlobalState& to, const GlobalState& part) {
    for (const auto& [name, values] : part) {
      std::vector<float>& out = to[name];
      out.resize(values.size());
      for (size_t i = 0; i < values.size(); ++i) out[i] += values[i];
    }
  }
  void add_rank(GlobalState& to, int step, int begin, int end, int rank) const {
    for (const Parameter& p : ranks_[static_cast<size_t>(rank)].all()) {
      if (!p.spec.trainable) continue;
      std::vector<float>& out = to[p.spec.name];
      out.resize(static_cast<size_t>(p.global_numel()));
      for (int64_t i = 0; i < p.numel(); ++i) {
        float sum = 0;
        for (int m = begin; m < end; ++m) {
          if (!contributes(p, step, m)) continue;
          const float half = half_gradient(job_, step, m, rank, p, i);
          sum = sum + half;
          sum = sum + half;
        }
        out[static_cast<size_t>(p.global_index(i))] += sum;
      }
    }
  }

  const ShardJob job_;
  std::deque<ParameterSet> ranks_;
};

// Adds flat slices to whole tensors, as a checkpoint would hold them; each element may come once.
void collect(Backend& backend, Stream& stream, GlobalState& state, GlobalState& seen,
             const std::vector<StateSlice>& slices) {
  std::vector<float> chunks(14);
  StateCopy copy(backend, Tensor(chunks.data(), DType::f32, {2, 7}));
  stream.synchronize();
  for (const StateTensor& box : state_tensors(slices)) {
    rank_check(box.dtype == DType::f32, "the type of " + box.name);
    std::vector<float> values(static_cast<size_t>(box.bytes()) / sizeof(float));
    void* const place = values.data();
    copy.queue({&box, 1}, {&place, 1}).synchronize();
    int64_t elements = 1;
    for (const int64_t n : box.global_shape) elements *= n;
    std::vector<float>& out = state[box.name];
    std::vector<float>& times = seen[box.name];
    out.resize(static_cast<size_t>(elements));
    times.resize(out.size());
    Parameter part;  // the box as a slice of its own
    part.spec.shape = box.global_shape;
    part.local_shape = box.extent;
    part.local_begin = box.offset;
    for (int64_t i = 0; i < part.numel(); ++i) {
      const size_t at = static_cast<size_t>(part.global_index(i));
      out[at] = values[static_cast<size_t>(i)];
      times[at] += 1;
    }
  }
}

void check_same(const std::string& what, const std::string& name, const std::vector<float>& got,
                const std::vector<float>& wanted) {
  rank_check(got.size() == wanted.size(), what + ": elements of " + name);
  for (size_t i = 0; i < got.size(); ++i)
    rank_check(got[i] == wanted[i], what + ": element " + std::to_string(i) + " of " + name +
                                        " is " + std::to_string(got[i]) + " instead of " +
                                        std::to_string(wanted[i]));
}

void load(Backend& backend, Stream& stream, const std::vector<StateSlice>& slices,
          const GlobalState& state) {
  for (const StateSlice& slice : slices) {
    const std::vector<float>& whole = state.at(slice.kind + "." + slice.parameter->spec.name);
    std::vector<float> values = read_slice(backend, stream, slice);
    for (int64_t i = slice.begin; i < slice.end; ++i) {
      const float value = whole[static_cast<size_t>(slice.parameter->global_index(i))];
      float& to = values[static_cast<size_t>(i - slice.begin)];
      to = slice.add ? to + value : value;
    }
    write_slice(backend, stream, values, slice);
  }
}

// Element i of an acquired parameter whose f32 value is `wanted`.
bool is_value(const Tensor& x, int64_t i, float wanted) {
  if (x.dtype() == DType::f32) return x.data<float>()[i] == wanted;
  return x.dtype() == DType::bf16 &&
         static_cast<const uint16_t*>(x.raw())[i] == split_master(wanted).high;
}

std::vector<std::string> kinds_of(const Parameter& p, const GlobalState& state) {
  std::vector<std::string> kinds;
  const std::string end = "." + p.spec.name;
  for (const auto& [name, values] : state)
    if (name.ends_with(end)) kinds.push_back(name.substr(0, name.size() - end.size()));
  return kinds;
}

// One rank's part of the steps.
class RankSteps {
 public:
  RankSteps(const ShardJob& job, RankContext& rank, ShardRank& shards)
      : job_(job),
        rank_(rank),
        store_(shards.store()),
        parameters_(shards.parameters()),
        master_ops_(rank.backend.ops()),
        dist_{job.dtype == DType::bf16 ? master_ops_ : rank.backend.ops(), rank.stream},
        adamw_(optimizer_of(job)),
        lossy_(job.compression.method != CompressionMethod::none) {
    for (const Parameter& p : parameters_.all())
      if (blocks_.empty() || blocks_.back() != p.spec.block) blocks_.push_back(p.spec.block);
  }

  void run(const ReferenceRun& reference) {
    scalars_.updates = step_ = reference.first_step;
    scalars_.in.lr = kLr;
    store_.clear(dist_);
    const GlobalState& start = reference.states[0].tensors;
    load(rank_.backend, rank_.stream, store_.loaded(), start);
    load(rank_.backend, rank_.stream,
         store_.loaded_residuals([&](const Parameter& p) { return kinds_of(p, start); }), start);
    for (size_t i = 0; i + 1 < reference.states.size(); ++i, ++step_) {
      values_ = &reference.states[i].tensors;
      store_.begin_step(step_);
      run_micro_batches();
      store_.reduce_gradients(dist_);
      update(reference.states[i + 1].sum_squares);
    }
  }

 private:
  void run_micro_batches() {
    const int M = job_.micro_batches;
    if (job_.order == CallOrder::ahead) forward(0);
    for (int m = 0; m < M; ++m) {
      if (job_.order != CallOrder::ahead)
        forward(m);
      else if (m + 1 < M)
        forward(m + 1);
      backward(m);
    }
  }

  void forward(int micro) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (i + 1 < blocks_.size()) store_.acquire_start(dist_, blocks_[i + 1]);
      check_values(blocks_[i]);
    }
    if (const Parameter* head = head_table()) add_half(micro, *head);
  }

  void backward(int micro) {
    store_.begin_micro_batch(micro + 1 == job_.micro_batches);
    const bool split = job_.order == CallOrder::split;
    for (size_t i = blocks_.size(); i-- > 0;) {
      if (i > 0) store_.acquire_start(dist_, blocks_[i - 1]);
      check_values(blocks_[i]);
      contribute(micro, blocks_[i], true);
      if (!split) contribute(micro, blocks_[i], false);
      if (!split) store_.grads_ready(dist_, blocks_[i]);
    }
    if (!split) return;
    store_.begin_micro_batch(micro + 1 == job_.micro_batches);
    for (size_t i = blocks_.size(); i-- > 0;) {
      contribute(micro, blocks_[i], false);
      store_.grads_ready(dist_, blocks_[i]);
    }
  }

  // The loss head adds in the forward pass.
  const Parameter* head_table() {
    return parameters_.find(job_.tied && last_stage() ? "embed" : "head");
  }
  bool last_stage() const { return parameters_.find("final") != nullptr; }

  void contribute(int micro, int block, bool early) {
    const Parameter* head = head_table();
    for (const Parameter& p : parameters_.all()) {
      if (p.spec.block != block || !p.spec.trainable || comes_early(p) != early) continue;
      add_half(micro, p);
      if (&p != head) add_half(micro, p);
    }
  }

  void add_half(int micro, const Parameter& p) {
    if (!contributes(p, step_, micro)) return;
    const GradTarget target = store_.grad(p);
    rank_check(target.grad.numel() == p.numel(), "shape of the gradient of " + p.spec.name);
    float* const grad = target.grad.data<float>();
    for (int64_t i = 0; i < p.numel(); ++i) {
      const float half = half_gradient(job_, step_, micro, rank_.world.rank(), p, i);
      grad[i] = target.accumulate == Accumulate::add ? grad[i] + half : half;
    }
  }

  void check_values(int block) {
    const AcquiredBlock outer(store_, dist_, block);
    { const AcquiredBlock inner(store_, dist_, block); }
    for (const Parameter& p : parameters_.all()) {
      if (p.spec.block != block || lossy_) continue;
      const std::vector<float>& wanted = values_->at("param." + p.spec.name);
      for (int64_t i = 0; i < p.numel(); ++i)
        rank_check(lossy_ || is_value(p.value, i, wanted[static_cast<size_t>(p.global_index(i))]),
                   "an acquired value of " + p.spec.name + " in step " + std::to_string(step_));
    }
  }

  void update(double wanted_sum_squares) {
    double sum = 0;
    const Tensor sum_1(&sum, DType::f64, {1});
    const bool twice = job_.fault == ShardFault::norm_counted_twice && rank_.world.rank() == 0;
    for (int i = 0; i < (twice ? 2 : 1); ++i) store_.add_norm(dist_, sum_1);
    rank_.world.all_reduce_sum(rank_.stream, sum_1);
    rank_check(lossy_ || std::abs(sum - wanted_sum_squares) <= 1e-12 * wanted_sum_squares,
               "the norm of step " + std::to_string(step_));
    adamw_.clip(dist_.ops, dist_.stream, sum_1, &scalars_);
    for (const OptimizerRange& range : store_.ranges())
      adamw_.update(dist_.ops, dist_.stream, range, &scalars_);
    if (job_.fault == ShardFault::tied_updated_twice && rank_.world.rank() == 0)
      adamw_.update(dist_.ops, dist_.stream, store_.ranges().front(), &scalars_);
    std::set<int> blocks;
    for (const ParameterGroup& group : parameters_.groups()) blocks.insert(group.block);
    for (const int block : blocks) store_.publish(dist_, block);
    store_.end_step(dist_, &scalars_);
  }

  const ShardJob job_;
  RankContext& rank_;
  ParamShards& store_;
  ParameterSet& parameters_;
  MasterOps master_ops_;
  const DistStream dist_;
  const AdamW adamw_;
  const bool lossy_;
  std::vector<int> blocks_;
  StepScalars scalars_;
  const GlobalState* values_ = nullptr;
  int step_ = 0;
};

}  // namespace

void declare_shard_job(ParameterSet& parameters, const ShardJob& job, const RankPlace& place) {
  const bool first = place.pipeline.rank == 0,
             last = place.pipeline.rank + 1 == place.pipeline.size;
  const ShardPlace cut = shard_place(place);
  const auto declare = [&](const std::string& name, int block, std::vector<int64_t> shape,
                           ShardSpec shard, Tie tie = Tie::none) {
    const bool decay = shape.size() > 1, trainable = !name.starts_with("bias");
    parameters.declare({.name = name,
                        .shape = std::move(shape),
                        .shard = shard,
                        .init = Init::normal,
                        .std = 0.5,
                        .weight_decay = decay,
                        .trainable = trainable,
                        .tie = tie,
                        .block = block},
                       cut);
  };
  if (first || job.tied)
    declare("embed", 0, {37, 9}, {.tensor_dim = 0, .uneven = true},
            !job.tied || (first && last) ? Tie::none
            : first                      ? Tie::owner
                                         : Tie::copy);
  for (int block = 1; block < kBlocks; ++block) {
    if (block <= 2 ? !first : !last) continue;
    const std::string of = "." + std::to_string(block);
    if (block == kShardJobHead) {
      declare("final", block, {13}, {});
      declare("tail", block, {5, 3},
              {.tensor_dim = 0, .uneven = true});  // nothing on a fourth rank
      if (!job.tied) declare("head", block, {37, 9}, {.tensor_dim = 0, .uneven = true});
      continue;
    }
    declare("norm" + of, block, {13}, {});
    declare("weight" + of, block, {24, 10 + block}, {.tensor_dim = 0});
    declare("down" + of, block, {10, 24}, {.tensor_dim = 1});
    declare("experts" + of, block, {4, 6, 5}, {.expert_dim = 0});
    declare("gate" + of, block, {4, 10}, {});
    declare("shift" + of, block, {24}, {.tensor_dim = 0});
    declare("bias" + of, block, {4}, {});
  }
}

namespace {

// One rank that holds everything, with memory of its own.
class WholeJob {
 public:
  explicit WholeJob(bool tied) : store_(declare(tied)) {
    store_.make_memory(
        [&](const char* owner, MemoryKind kind, const std::function<void(Arena&)>& make) {
          Arena measure(owner);
          make(measure);
          memory_.emplace_back(*backend_, measure.peak(), kind);
          Arena arena(owner, memory_.back().data(), measure.peak());
          make(arena);
        });
    store_.clear(dist());
  }
  Backend& backend() { return *backend_; }
  DistStream dist() { return {backend_->ops(), *stream_}; }
  ParameterSet& parameters() { return parameters_; }
  LocalParamStore& store() { return store_; }
  GlobalState state() {
    GlobalState state, seen;
    collect(*backend_, *stream_, state, seen, store_.saved());
    return state;
  }

 private:
  ParameterSet& declare(bool tied) {
    ShardJob whole;
    whole.tied = tied;
    return parameters_of_rank(parameters_, whole, 0);
  }

  std::unique_ptr<Backend> backend_ = make_cpu_backend(1);
  std::unique_ptr<Stream> stream_ = backend_->make_stream();
  ParameterSet parameters_;
  LocalParamStore store_;
  std::vector<DeviceMemory> memory_;
};

}  // namespace

GlobalState initial_state(bool tied) {
  WholeJob whole(tied);
  whole.parameters().initialize(whole.dist().ops, whole.dist().stream, 11);
  return whole.state();
}

ReferenceRun run_reference(const ShardJob& job, int steps, const GlobalState& start,
                           int first_step) {
  WholeJob whole(job.tied);
  LocalParamStore& store = whole.store();
  const DistStream dist = whole.dist();
  load(whole.backend(), dist.stream, store.loaded(), start);
  const ReferenceGradients gradients(job);
  const AdamW adamw(optimizer_of(job));
  StepScalars scalars;
  scalars.updates = first_step;
  scalars.in.lr = kLr;
  ReferenceRun run{first_step, {{start, 0}}};
  for (int step = first_step; step < first_step + steps; ++step) {
    store.begin_step(step);
    for (const auto& [name, sum] : gradients.of_step(step))
      std::memcpy(store.grad(*whole.parameters().find(name)).grad.raw(), sum.data(),
                  sum.size() * sizeof(float));
    store.reduce_gradients(dist);
    double sum = 0;
    const Tensor sum_1(&sum, DType::f64, {1});
    store.add_norm(dist, sum_1);
    adamw.clip(dist.ops, dist.stream, sum_1, &scalars);
    for (const OptimizerRange& range : store.ranges())
      adamw.update(dist.ops, dist.stream, range, &scalars);
    run.states.push_back({whole.state(), sum});
  }
  return run;
}

namespace {

ShardRanks ranks_of(const ShardJob& job, ProcessMesh& mesh) {
  ShardRanks ranks;
  const bool faulty = job.fault == ShardFault::replicated_not_summed;
  ranks.groups[number_of(ReduceGroup::tensor_cut)] = &mesh.group(MeshGroup::data_context);
  ranks.groups[number_of(ReduceGroup::replicated)] =
      &mesh.group(faulty ? MeshGroup::data_context : MeshGroup::stage);
  ranks.groups[number_of(ReduceGroup::expert)] = &mesh.group(MeshGroup::expert_data);
  ranks.ties = &mesh.group(MeshGroup::embedding);
  return ranks;
}

ReducerFactory reducers_of(const ShardJob& job, ProcessMesh& mesh) {
  return [&](ReduceGroup group, const ParameterSet& parameters, std::vector<GradRange> ranges) {
    ReduceRanks ranks;
    ranks.all = ranks_of(job, mesh).groups[number_of(group)];
    const GradReducerOptions options{.compression = job.compression,
                                     .hierarchical = false,
                                     .gathers = job.zero == 0,
                                     .dtype = DType::f32,
                                     .rounds = job.rounds};
    return make_grad_reducer(options, ranks, parameters, std::move(ranges));
  };
}

}  // namespace

ShardRank::ShardRank(const ShardJob& job, RankContext& rank)
    : mesh_(job.shape, rank.world, rank.backend),
      parameters_(),
      exposed_(rank.backend, /*measures=*/false),
      store_(rank.backend, parameters_of_rank(parameters_, job, rank.world.rank()), {job.dtype},
             {job.zero, job.keep_full_grads, kShardJobHead}, ranks_of(job, mesh_),
             reducers_of(job, mesh_), exposed_) {
  std::vector<int64_t> bytes;
  store_.make_memory([&](const char* owner, MemoryKind, const std::function<void(Arena&)>& make) {
    Arena arena(owner);
    make(arena);
    planned_[owner] += bytes.emplace_back(arena.peak());
  });
  size_t next = 0;
  store_.make_memory(
      [&](const char* owner, MemoryKind kind, const std::function<void(Arena&)>& make) {
        const int64_t size = bytes.at(next++);
        memory_.emplace_back(rank.backend, std::max<int64_t>(size, 1), kind);
        std::memset(memory_.back().data(), 0xff,
                    static_cast<size_t>(std::max<int64_t>(size, 1)));  // NaN
        Arena arena(owner, memory_.back().data(), size);
        make(arena);
      });
}

JobRun::JobRun(const ShardJob& job, const ReferenceRun& reference, AtEnd at_end)
    : job_(job), reference_(reference), at_end_(std::move(at_end)) {}

void JobRun::run_rank(RankContext& rank) {
  ShardRank shards(job_, rank);
  RankSteps(job_, rank, shards).run(reference_);
  if (at_end_) at_end_(rank, shards.store());
  const std::lock_guard lock(mutex_);
  collect(rank.backend, rank.stream, state_, times_, shards.store().saved());
}

GlobalState JobRun::finish() {
  for (const auto& [name, elements] : times_)
    for (const float times : elements)
      rank_check(times == 1, "an element of " + name + " is saved once");
  if (job_.compression.method != CompressionMethod::none) return std::move(state_);
  const GlobalState& wanted = reference_.states.back().tensors;
  rank_check(state_.size() == wanted.size(), "the tensors that are saved");
  for (const auto& [name, values] : wanted)
    check_same("the state at the end", name, state_.at(name), values);
  return std::move(state_);
}

GlobalState run_shard_job(const ShardJob& job, const ReferenceRun& reference, const AtEnd& at_end) {
  JobRun run(job, reference, at_end);
  run_ranks(static_cast<int>(job.shape.ranks()), [&](RankContext& rank) { run.run_rank(rank); });
  return run.finish();
}

}  // namespace dstrain::test
