// The parts of a Distribution as they are: wrappers from which tests derive ones that do something
// else.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "core/dist/distribution.h"

namespace dstrain::test {

class WrappedTensorParallel : public TensorParallel {
 public:
  explicit WrappedTensorParallel(TensorParallel& inner) : inner_(inner) {}
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void gather_start(DistStream dist, const Tensor& x_tD, const Tensor& x_TD) override {
    inner_.gather_start(dist, x_tD, x_TD);
  }
  void gather_finish(DistStream dist, const Tensor& x_tD, const Tensor& x_TD) override {
    inner_.gather_finish(dist, x_tD, x_TD);
  }
  void reduce_scatter_start(DistStream dist, const Tensor& y_TD, const Tensor& out_tD) override {
    inner_.reduce_scatter_start(dist, y_TD, out_tD);
  }
  void reduce_scatter_finish(DistStream dist, const Tensor& y_TD, const Tensor& out_tD) override {
    inner_.reduce_scatter_finish(dist, y_TD, out_tD);
  }
  void all_reduce_sum(DistStream dist, const Tensor& x) override { inner_.all_reduce_sum(dist, x); }
  void all_reduce_max(DistStream dist, const Tensor& x) override { inner_.all_reduce_max(dist, x); }

 protected:
  TensorParallel& inner_;
};

class WrappedDispatcher : public TokenDispatcher {
 public:
  explicit WrappedDispatcher(TokenDispatcher& inner) : inner_(inner) {}
  bool local() const override { return inner_.local(); }
  int64_t max_rows(int64_t tokens, int64_t experts_per_token) const override {
    return inner_.max_rows(tokens, experts_per_token);
  }
  void route(DistStream dist, int64_t num_experts, Routing& routing, Arena& keep) override {
    inner_.route(dist, num_experts, routing, keep);
  }
  int rounds(DistStream dist, const Routing& routing) const override {
    return inner_.rounds(dist, routing);
  }
  void dispatch_start(DistStream dist, int round, const Tensor& x_TD, const Routing& routing,
                      Arena& rows, Arena& scratch) override {
    inner_.dispatch_start(dist, round, x_TD, routing, rows, scratch);
  }
  ExpertRows dispatch_finish(DistStream dist, const Tensor& x_TD, const Routing& routing) override {
    return inner_.dispatch_finish(dist, x_TD, routing);
  }
  void dispatch_again_start(DistStream dist, const ExpertRows& round, const Tensor& dy_TD,
                            const Routing& routing, Arena& rows, Arena& scratch) override {
    inner_.dispatch_again_start(dist, round, dy_TD, routing, rows, scratch);
  }
  Tensor dispatch_again_finish(DistStream dist, const Tensor& dy_TD) override {
    return inner_.dispatch_again_finish(dist, dy_TD);
  }
  void return_start(DistStream dist, const ExpertRows& round, const ExpertResults& results,
                    const Routing& routing, Arena& scratch) override {
    inner_.return_start(dist, round, results, routing, scratch);
  }
  void return_finish(DistStream dist, const ExpertRows& round, const ExpertResults& results,
                     const Routing& routing, const TokenResults& tokens) override {
    inner_.return_finish(dist, round, results, routing, tokens);
  }

 protected:
  TokenDispatcher& inner_;
};

class WrappedKvExchange : public KvExchange {
 public:
  explicit WrappedKvExchange(KvExchange& inner) : inner_(inner) {}
  int peers() const override { return inner_.peers(); }
  KeysValues own(DistStream dist, int layer, const Tensor& k_TGQ, const Tensor& v_TGW,
                 const AttentionSegments& local) override {
    return inner_.own(dist, layer, k_TGQ, v_TGW, local);
  }
  void pass_start(DistStream dist, const KeyRows& rows, int64_t sequences, Returns returns,
                  Arena& arena) override {
    inner_.pass_start(dist, rows, sequences, returns, arena);
  }
  Peer next(DistStream dist) override { return inner_.next(dist); }
  void give(DistStream dist) override { inner_.give(dist); }
  void pass_finish(DistStream dist, const KeyRows& gradients) override {
    inner_.pass_finish(dist, gradients);
  }

 protected:
  KvExchange& inner_;
};

class WrappedSequenceSums : public SequenceSums {
 public:
  explicit WrappedSequenceSums(SequenceSums& inner) : inner_(inner) {}
  void reduce_start(DistStream dist, const Tensor& x) override { inner_.reduce_start(dist, x); }
  void reduce_finish(DistStream dist, const Tensor& x) override { inner_.reduce_finish(dist, x); }

 protected:
  SequenceSums& inner_;
};

class WrappedParamStore : public ParamStore {
 public:
  WrappedParamStore(std::unique_ptr<ParamStore> inner, ParameterSet& parameters,
                    const RankPlace& place)
      : inner_(std::move(inner)), parameters_(parameters), place_(place) {}
  void make_memory(const OwnerVisitor& visit) override { inner_->make_memory(visit); }
  void clear(DistStream dist) override { inner_->clear(dist); }
  void acquire_start(DistStream dist, int block) override { inner_->acquire_start(dist, block); }
  void acquire_finish(DistStream dist, int block) override { inner_->acquire_finish(dist, block); }
  void release(DistStream dist, int block) override { inner_->release(dist, block); }
  GradTarget grad(const Parameter& parameter) override { return inner_->grad(parameter); }
  void grads_ready(DistStream dist, int block) override { inner_->grads_ready(dist, block); }
  void begin_step(int64_t step) override { inner_->begin_step(step); }
  void begin_micro_batch(bool last_of_step) override { inner_->begin_micro_batch(last_of_step); }
  void reduce_gradients(DistStream dist) override { inner_->reduce_gradients(dist); }
  void add_norm(DistStream dist, const Tensor& sum_1) override { inner_->add_norm(dist, sum_1); }
  std::span<const OptimizerRange> ranges() const override { return inner_->ranges(); }
  void publish(DistStream dist, int block) override { inner_->publish(dist, block); }
  void end_step(DistStream dist, const StepScalars* scalars) override {
    inner_->end_step(dist, scalars);
  }
  std::vector<StateSlice> saved() const override { return inner_->saved(); }
  std::vector<StateSlice> loaded() const override { return inner_->loaded(); }
  void begin_state_copy(DistStream copies) override { inner_->begin_state_copy(copies); }
  void hold_state(Event& copied) override { inner_->hold_state(copied); }

 protected:
  std::unique_ptr<ParamStore> inner_;
  ParameterSet& parameters_;
  RankPlace place_;
};

// What to put in the place of each part; where one is absent, the part itself serves.
struct DistributionParts {
  std::function<std::unique_ptr<TensorParallel>(TensorParallel&)> tensor;
  std::function<std::unique_ptr<TokenDispatcher>(TokenDispatcher&)> dispatcher;
  std::function<std::unique_ptr<KvExchange>(KvExchange&, const RankPlace&)> kv;
  std::function<std::unique_ptr<SequenceSums>(SequenceSums&, const RankPlace&)> sequences;
  std::function<std::unique_ptr<ParamStore>(std::unique_ptr<ParamStore>, ParameterSet&,
                                            const RankPlace&)>
      store;
  std::function<void(Distribution& inner, DistStream, const Tensor&)> sum_over_ranks;
};

class WrappedDistribution : public Distribution {
 public:
  WrappedDistribution(Distribution& inner, const DistributionParts& parts)
      : inner_(inner), parts_(parts) {
    if (parts.tensor) tensor_ = parts.tensor(inner.tensor());
    if (parts.dispatcher) dispatcher_ = parts.dispatcher(inner.dispatcher());
    if (parts.kv) kv_ = parts.kv(inner.kv(), inner.place());
    if (parts.sequences) sequences_ = parts.sequences(inner.sequences(), inner.place());
  }
  const RankPlace& place() const override { return inner_.place(); }
  TensorParallel& tensor() override { return tensor_ ? *tensor_ : inner_.tensor(); }
  TokenDispatcher& dispatcher() override {
    return dispatcher_ ? *dispatcher_ : inner_.dispatcher();
  }
  KvExchange& kv() override { return kv_ ? *kv_ : inner_.kv(); }
  SequenceSums& sequences() override { return sequences_ ? *sequences_ : inner_.sequences(); }
  std::unique_ptr<ParamStore> make_param_store(ParameterSet& parameters,
                                               const ParamStoreOptions& options) override {
    auto store = inner_.make_param_store(parameters, options);
    return parts_.store ? parts_.store(std::move(store), parameters, place()) : std::move(store);
  }
  void sum_over_ranks(DistStream dist, const Tensor& x) override {
    if (parts_.sum_over_ranks) return parts_.sum_over_ranks(inner_, dist, x);
    inner_.sum_over_ranks(dist, x);
  }

 private:
  Distribution& inner_;
  DistributionParts parts_;
  std::unique_ptr<TensorParallel> tensor_;
  std::unique_ptr<TokenDispatcher> dispatcher_;
  std::unique_ptr<KvExchange> kv_;
  std::unique_ptr<SequenceSums> sequences_;
};

}  // namespace dstrain::test
