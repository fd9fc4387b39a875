#include "test/support/layout_faults.h"

#include <algorithm>
#include <map>

#include "core/dist/sequence_pieces.h"
#include "test/support/wrapped_distribution.h"

namespace dstrain::test {
namespace {

using Filter = std::function<bool(const Parameter&)>;

Filter named(const std::string& part) {
  return [part](const Parameter& p) { return p.spec.name.find(part) != std::string::npos; };
}

bool any_parameter(const Parameter&) {
  return true;
}

// Elements [begin, end) of a parameter that this rank updates, and their gradients.
struct UpdatedPart {
  const Parameter* parameter;
  int64_t begin, end;
  float* grad;
};

// Moments lie parallel to the gradients of the ranges, and are named by the slices of the state.
std::vector<UpdatedPart> updated_parts(const ParamStore& store) {
  std::vector<UpdatedPart> parts;
  for (const StateSlice& slice : store.loaded()) {
    if (slice.kind != "adamw.exp_avg" || slice.begin == slice.end) continue;
    for (const OptimizerRange& range : store.ranges()) {
      const int64_t at = slice.data.data<float>() - range.exp_avg.data<float>();
      if (at >= 0 && at < range.exp_avg.numel())
        parts.push_back({slice.parameter, slice.begin, slice.end, range.grad.data<float>() + at});
    }
  }
  return parts;
}

// Sums of gradients times a factor.
class ScaledSums : public WrappedParamStore {
 public:
  ScaledSums(std::unique_ptr<ParamStore> inner, ParameterSet& parameters, const RankPlace& place,
             Filter filter, float factor)
      : WrappedParamStore(std::move(inner), parameters, place),
        filter_(std::move(filter)),
        factor_(factor) {}
  void reduce_gradients(DistStream dist) override {
    inner_->reduce_gradients(dist);
    for (const UpdatedPart& part : updated_parts(*inner_))
      if (filter_(*part.parameter))
        std::for_each_n(part.grad, part.end - part.begin, [&](float& g) { g *= factor_; });
  }

 private:
  Filter filter_;
  float factor_;
};

// Looks at, and may change, this rank's gradients of a step before they are summed (ZeRO 0 and 1).
class BeforeSums : public WrappedParamStore {
 public:
  using WrappedParamStore::WrappedParamStore;
  void begin_step(int64_t step) override {
    step_ = step;
    inner_->begin_step(step);
  }
  void begin_micro_batch(bool last_of_step) override {
    last_ = last_of_step;
    inner_->begin_micro_batch(last_of_step);
  }
  void grads_ready(DistStream dist, int block) override {
    if (last_ && !dist.dry)
      for (Parameter& p : parameters_.all())
        if (p.spec.block == block && p.spec.trainable) before_sum(p);
    inner_->grads_ready(dist, block);
  }

 protected:
  virtual void before_sum(Parameter& parameter) = 0;
  int64_t step() const { return step_; }

 private:
  int64_t step_ = 0;
  bool last_ = false;
};

// Each rank updates with its own gradients.
class OwnGradients : public BeforeSums {
 public:
  OwnGradients(std::unique_ptr<ParamStore> inner, ParameterSet& parameters, const RankPlace& place,
               Filter filter)
      : BeforeSums(std::move(inner), parameters, place), filter_(std::move(filter)) {}
  void reduce_gradients(DistStream dist) override {
    inner_->reduce_gradients(dist);
    for (const UpdatedPart& part : updated_parts(*inner_))
      if (const auto own = own_.find(part.parameter); own != own_.end())
        std::copy(own->second.begin() + part.begin, own->second.begin() + part.end, part.grad);
  }

 protected:
  void before_sum(Parameter& p) override {
    if (filter_(p)) own_[&p].assign(p.grad.data<float>(), p.grad.data<float>() + p.numel());
  }

 private:
  Filter filter_;
  std::map<const Parameter*, std::vector<float>> own_;
};

// The gradients of a mean over this rank's tokens, and then the mean over ranks.
class MeanOfMeans : public BeforeSums {
 public:
  MeanOfMeans(std::unique_ptr<ParamStore> inner, ParameterSet& parameters, const RankPlace& place,
              const Config& config)
      : BeforeSums(std::move(inner), parameters, place), config_(config) {}

 protected:
  void before_sum(Parameter& p) override {
    const RandomSequences sequences(config_);
    const int64_t G = config_.train.global_batch, B = config_.train.micro_batch;
    int64_t own = 0;
    for (int64_t s = place_.data.rank * B; s < G; s += place_.data.size * B)
      own += sequences.batch(step() * G + s, B).valid_tokens();
    const int64_t all = sequences.batch(step() * G, G).valid_tokens();
    const float factor = static_cast<float>(all) / static_cast<float>(own * place_.data.size);
    std::for_each_n(p.grad.data<float>(), p.numel(), [&](float& g) { g *= factor; });
  }

 private:
  Config config_;
};

class NormTwice : public WrappedParamStore {
 public:
  using WrappedParamStore::WrappedParamStore;
  void add_norm(DistStream dist, const Tensor& sum_1) override {
    inner_->add_norm(dist, sum_1);
    if (place_.in_world().rank == 0) inner_->add_norm(dist, sum_1);
  }
};

// Ranges that hold a tied table are updated twice a step.
class TiedTwice : public WrappedParamStore {
 public:
  using WrappedParamStore::WrappedParamStore;
  std::span<const OptimizerRange> ranges() const override {
    all_.assign(inner_->ranges().begin(), inner_->ranges().end());
    const size_t count = all_.size();
    for (const UpdatedPart& part : updated_parts(*inner_))
      for (size_t i = 0; i < count && part.parameter->spec.tie != Tie::none; ++i) {
        const float* grad = all_[i].grad.data<float>();
        if (part.grad >= grad && part.grad < grad + all_[i].grad.numel()) all_.push_back(all_[i]);
      }
    std::ranges::stable_sort(all_, {}, &OptimizerRange::block);
    return all_;
  }

 private:
  mutable std::vector<OptimizerRange> all_;
};

// The second rank keeps the old values of what others update.
class StaleValues : public WrappedParamStore {
 public:
  using WrappedParamStore::WrappedParamStore;
  void begin_step(int64_t step) override {
    inner_->begin_step(step);
    for (const Parameter& p : parameters_.all())
      old_[&p].assign(p.value.data<float>(), p.value.data<float>() + p.numel());
    for (const UpdatedPart& part : updated_parts(*inner_)) {
      std::vector<float>& old = old_[part.parameter];
      std::fill(old.begin() + part.begin, old.begin() + part.end, kUpdatedHere);
    }
  }
  void publish(DistStream dist, int block) override {
    inner_->publish(dist, block);
    if (place_.in_world().rank != 1) return;
    for (const Parameter& p : parameters_.all())
      for (int64_t i = 0; i < p.numel() && p.spec.trainable && p.spec.block == block; ++i)
        if (const float old = old_[&p][static_cast<size_t>(i)]; old != kUpdatedHere)
          p.value.data<float>()[i] = old;
  }

 private:
  static constexpr float kUpdatedHere = 1e30f;
  std::map<const Parameter*, std::vector<float>> old_;
};

class NoSoftmaxSum : public WrappedTensorParallel {
 public:
  using WrappedTensorParallel::WrappedTensorParallel;
  void all_reduce_sum(DistStream, const Tensor&) override {}
};

class NoSequenceSums : public WrappedSequenceSums {
 public:
  using WrappedSequenceSums::WrappedSequenceSums;
  void reduce_start(DistStream, const Tensor&) override {}
  void reduce_finish(DistStream, const Tensor&) override {}
};

// Every token counts once per tensor-parallel rank.
class ScaledSequenceSums : public WrappedSequenceSums {
 public:
  ScaledSequenceSums(SequenceSums& inner, const RankPlace& place)
      : WrappedSequenceSums(inner), place_(place) {}
  void reduce_finish(DistStream dist, const Tensor& x) override {
    inner_.reduce_finish(dist, x);
    if (dist.dry) return;
    std::for_each_n(x.data<float>(), x.numel(),
                    [&](float& v) { v *= static_cast<float>(place_.tensor.size); });
  }

 private:
  RankPlace place_;
};

// What a rank found for the keys of others is lost.
class OwnKeyGradients : public WrappedKvExchange {
 public:
  using WrappedKvExchange::WrappedKvExchange;
  Peer next(DistStream dist) override { return current_ = inner_.next(dist); }
  void give(DistStream dist) override {
    for (const Tensor& x : current_.gradients)
      if (x.defined()) dist.ops.fill(dist.stream, x, 0);
    inner_.give(dist);
  }

 private:
  Peer current_;
};

class OneRound : public WrappedDispatcher {
 public:
  using WrappedDispatcher::WrappedDispatcher;
  int rounds(DistStream dist, const Routing& routing) const override {
    return dist.dry ? inner_.rounds(dist, routing) : 1;
  }
};

class NoWeightGradients : public WrappedDispatcher {
 public:
  using WrappedDispatcher::WrappedDispatcher;
  void return_finish(DistStream dist, const ExpertRows& round, const ExpertResults& results,
                     const Routing& routing, const TokenResults& tokens) override {
    inner_.return_finish(dist, round, results, routing, tokens);
    if (!dist.dry && tokens.dweights_TK.defined())
      dist.ops.fill(dist.stream, tokens.dweights_TK, 0.0);
  }
};

// A token's results from the first rank that has experts of its choice are lost.
class NoFirstResults : public WrappedDispatcher {
 public:
  using WrappedDispatcher::WrappedDispatcher;
  ExpertRows dispatch_finish(DistStream dist, const Tensor& x_TD, const Routing& routing) override {
    const ExpertRows rows = inner_.dispatch_finish(dist, x_TD, routing);
    if (!dist.dry) {
      const Tensor& sent_TN = rows.sent_of_token_TN;
      for (int64_t t = 0; t < sent_TN.size(0); ++t)
        sent_TN.data<int32_t>()[t * sent_TN.size(1)] = -1;
    }
    return rows;
  }
};

// --- what to plant

PlantedFault planted(const DistributionParts& parts) {
  PlantedFault fault;
  fault.wrap = [parts](Distribution& inner) {
    return std::make_unique<WrappedDistribution>(inner, parts);
  };
  return fault;
}

template <class Store, class... Args>
PlantedFault store(const Args&... args) {
  DistributionParts parts;
  parts.store = [=](std::unique_ptr<ParamStore> inner, ParameterSet& parameters,
                    const RankPlace& place) {
    return std::make_unique<Store>(std::move(inner), parameters, place, args...);
  };
  return planted(parts);
}

template <class Dispatcher>
PlantedFault dispatcher() {
  DistributionParts parts;
  parts.dispatcher = [](TokenDispatcher& inner) { return std::make_unique<Dispatcher>(inner); };
  return planted(parts);
}

PlantedFault sum_over_ranks(std::function<void(Distribution&, DistStream, const Tensor&)> sum) {
  DistributionParts parts;
  parts.sum_over_ranks = std::move(sum);
  return planted(parts);
}

PlantedFault edit_batch(std::function<void(const RankPlace&, int64_t, SequenceBatch&)> edit) {
  PlantedFault fault;
  fault.edit_batch = std::move(edit);
  return fault;
}

// --- the faults of each axis

LayoutJob moe(const MeshShape& shape, int64_t zero = 1) {
  return job_at(tiny_moe_job(4), shape, zero);
}
LayoutJob dense(const MeshShape& shape, int64_t zero = 1) {
  return job_at(tiny_dense_job(4), shape, zero);
}

constexpr MeshShape kPipeline{.pipeline = 2}, kData{.data = 2}, kContext{.context = 2},
    kTensor{.tensor = 2};
constexpr MeshShape kExpert{.data = 2, .expert = 2};
const char* const kGradients = "gradients of step 1";
const char* const kNorm = "gradient norm of step 1";
const char* const kLosses = "losses";
const char* const kParameters = "parameters after the last step";
const char* const kCopies = "copies on other ranks";

void add_data_faults(std::vector<LayoutFault>& all) {
  all.push_back({"gradients are means over data-parallel ranks", moe(kData), kGradients,
                 store<ScaledSums>(Filter(any_parameter), 0.5f)});
  LayoutJob uneven = dense(kData);
  uneven.config.run.seed = 7;  // other numbers of targets on the two ranks in the first step
  all.push_back({"the loss is the mean of the ranks' means", uneven, kGradients,
                 store<MeanOfMeans>(uneven.config)});
  all.push_back(
      {"the norm counts one rank's gradients twice", dense(kData), kNorm, store<NormTwice>()});
  all.push_back({"a rank keeps old values of another rank's shard", dense(kData), kCopies,
                 store<StaleValues>()});
  all.push_back({"a rank skips the targets of a micro-batch", dense(kData), kLosses,
                 edit_batch([](const RankPlace& place, int64_t m, SequenceBatch& batch) {
                   if (place.data.rank == 1 && m == 1) std::ranges::fill(batch.targets_T, -1);
                 })});
  all.push_back({"a rank does not tell documents apart", dense(kData), kLosses,
                 edit_batch([](const RankPlace& place, int64_t, SequenceBatch& batch) {
                   if (place.data.rank == 1)
                     batch.segment_offsets = {0, static_cast<int32_t>(batch.tokens_T.size())};
                 })});
}

void add_tensor_faults(std::vector<LayoutFault>& all) {
  all.push_back({"norm weights keep their own gradients under tensor parallelism",
                 dense(kTensor, 0), kGradients, store<OwnGradients>(named("layernorm"))});
  all.push_back({"the balance loss counts a token once per tensor-parallel rank", moe(kTensor),
                 kGradients, [] {
                   DistributionParts parts;
                   parts.sequences = [](SequenceSums& inner, const RankPlace& place) {
                     return std::make_unique<ScaledSequenceSums>(inner, place);
                   };
                   return planted(parts);
                 }()});
  all.push_back({"the loss counts once per tensor-parallel rank", dense(kTensor), kLosses,
                 sum_over_ranks([](Distribution& inner, DistStream dist, const Tensor& x) {
                   inner.sum_over_ranks(dist, x);
                   if (x.dtype() == DType::f64) x.data<double>()[0] *= inner.place().tensor.size;
                 })});
  all.push_back({"the softmax sums over a part of the vocabulary", dense(kTensor), kLosses, [] {
                   DistributionParts parts;
                   parts.tensor = [](TensorParallel& inner) {
                     return std::make_unique<NoSoftmaxSum>(inner);
                   };
                   return planted(parts);
                 }()});
}

void add_context_faults(std::vector<LayoutFault>& all) {
  all.push_back({"the router's weight keeps its own gradient under context parallelism",
                 moe(kContext, 0), kGradients, store<OwnGradients>(named("mlp.gate.weight"))});
  all.push_back({"positions start again on a context-parallel rank", dense(kContext), kLosses,
                 edit_batch([](const RankPlace& place, int64_t, SequenceBatch& batch) {
                   int32_t position = 0;
                   for (const SequencePiece& piece : pieces_of(batch.length, place.context))
                     for (int64_t t = piece.begin; t < piece.end && place.context.rank == 1; ++t)
                       batch.positions_T[static_cast<size_t>(t)] = position++;
                 })});
  DistributionParts own_keys;
  own_keys.kv = [](KvExchange& inner, const RankPlace&) {
    return std::make_unique<OwnKeyGradients>(inner);
  };
  all.push_back({"gradients of keys and values stay where they arise", dense(kContext), kGradients,
                 planted(own_keys)});
  all.push_back(
      {"gradients of latents stay where they arise", moe(kContext), kGradients, planted(own_keys)});
  all.push_back({"balance statistics are of a part of the sequence", moe(kContext), kLosses, [] {
                   DistributionParts parts;
                   parts.sequences = [](SequenceSums& inner, const RankPlace&) {
                     return std::make_unique<NoSequenceSums>(inner);
                   };
                   return planted(parts);
                 }()});
}

void add_expert_faults(std::vector<LayoutFault>& all) {
  all.push_back({"expert gradients count twice", moe(kExpert), kGradients,
                 store<ScaledSums>(Filter(&Parameter::is_expert), 2.0f)});
  LayoutJob narrow = moe(kExpert);
  narrow.config.parallel.expert_buffer = 1.0;
  all.push_back({"rows of further rounds are dropped", narrow, kLosses, dispatcher<OneRound>()});
  all.push_back({"gradients of expert weights do not come back", moe(kExpert), kGradients,
                 dispatcher<NoWeightGradients>()});
  all.push_back({"what one rank's experts gave does not come back", moe(kExpert), kLosses,
                 dispatcher<NoFirstResults>()});
  all.push_back({"balancing biases follow a rank's own tokens", moe(kExpert), kParameters,
                 sum_over_ranks([](Distribution& inner, DistStream dist, const Tensor& x) {
                   if (x.dtype() != DType::i64) inner.sum_over_ranks(dist, x);
                 })});
}

void add_pipeline_faults(std::vector<LayoutFault>& all) {
  DistributionParts scaled;
  scaled.store = [](std::unique_ptr<ParamStore> inner, ParameterSet& parameters,
                    const RankPlace& place) {
    const float factor = place.pipeline.rank == 0 ? 2.0f : 1.0f;
    return std::make_unique<ScaledSums>(std::move(inner), parameters, place, any_parameter, factor);
  };
  all.push_back(
      {"the gradient that enters a stage is doubled", moe(kPipeline), kGradients, planted(scaled)});
  const Filter tied = [](const Parameter& p) { return p.spec.tie != Tie::none; };
  all.push_back({"gradients of a tied table are not summed", dense(kPipeline), kGradients,
                 store<OwnGradients>(tied)});
  all.push_back(
      {"a tied table is updated twice", dense(kPipeline), kParameters, store<TiedTwice>()});
}

}  // namespace

std::vector<LayoutFault> layout_faults() {
  std::vector<LayoutFault> all;
  add_data_faults(all);
  add_tensor_faults(all);
  add_context_faults(all);
  add_expert_faults(all);
  add_pipeline_faults(all);
  return all;
}

}  // namespace dstrain::test
