// The single-rank versions of core/dist: nothing is sent, and what they return defines what the
// distributed versions must return.
#pragma once

#include <memory>
#include <vector>

#include "core/dist/distribution.h"

namespace dstrain {

class LocalTensorParallel : public TensorParallel {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void gather_start(DistStream, const Tensor&, const Tensor&) override {}
  void gather_finish(DistStream, const Tensor&, const Tensor&) override {}
  void reduce_scatter_start(DistStream, const Tensor&, const Tensor&) override {}
  void reduce_scatter_finish(DistStream, const Tensor&, const Tensor&) override {}
  void all_reduce_sum(DistStream, const Tensor&) override {}
  void all_reduce_max(DistStream, const Tensor&) override {}
};

// Experts read token rows through the sorted index; gathered rows are never stored.
class LocalDispatcher : public TokenDispatcher {
 public:
  bool local() const override { return true; }
  int64_t max_rows(int64_t tokens, int64_t experts_per_token) const override {
    return tokens * experts_per_token;
  }
  void route(DistStream, int64_t num_experts, Routing& routing, Arena& keep) override;
  int rounds(DistStream, const Routing&) const override { return 1; }
  void dispatch_start(DistStream, int, const Tensor&, const Routing&, Arena&, Arena&) override {}
  ExpertRows dispatch_finish(DistStream, const Tensor& x_TD, const Routing& routing) override {
    return {.round = 0,
            .x_XD = x_TD,
            .row_index_R = routing.token_of_row_R,
            .offsets_E1 = routing.offsets_E1,
            .row_weight_R = routing.row_weight_R};
  }
  void dispatch_again_start(DistStream, const ExpertRows&, const Tensor&, const Routing&, Arena&,
                            Arena&) override {}
  Tensor dispatch_again_finish(DistStream, const Tensor& dy_TD) override { return dy_TD; }
  void return_start(DistStream, const ExpertRows&, const ExpertResults&, const Routing&,
                    Arena&) override {}
  void return_finish(DistStream dist, const ExpertRows& round, const ExpertResults& results,
                     const Routing& routing, const TokenResults& tokens) override;
};

class LocalKvExchange : public KvExchange {
 public:
  int peers() const override { return 0; }
  KeysValues own(DistStream, int, const Tensor& k_TGQ, const Tensor& v_TGW,
                 const AttentionSegments& local) override {
    return {k_TGQ, v_TGW, local};
  }
  void pass_start(DistStream, const KeyRows&, int64_t, Returns, Arena&) override {}
  Peer next(DistStream) override { return {}; }
  void give(DistStream) override {}
  void pass_finish(DistStream, const KeyRows&) override {}
};

class LocalSequenceSums : public SequenceSums {
 public:
  void reduce_start(DistStream, const Tensor&) override {}
  void reduce_finish(DistStream, const Tensor&) override {}
};

// Which parameters have had a contribution to their gradient since begin(): the first overwrites
// what was there, later ones add.
class GradContributions {
 public:
  explicit GradContributions(const ParameterSet& parameters);
  void begin();           // for all
  void begin(int block);  // for those of a block
  Accumulate next(const Parameter& parameter);
  bool any(const Parameter& parameter) const { return written_[index_of(parameter)].second; }

 private:
  size_t index_of(const Parameter& parameter) const;
  std::vector<std::pair<const Parameter*, bool>> written_;  // sorted by address
};

// Values, gradients and moments are whole and lie here; of bf16 values the lower halves, too.
class LocalParamStore : public ParamStore {
 public:
  explicit LocalParamStore(ParameterSet& parameters, const ParamStoreOptions& options = {});

  void make_memory(const OwnerVisitor& visit) override;
  void clear(DistStream dist) override;
  void acquire_start(DistStream, int) override {}
  void acquire_finish(DistStream, int) override {}
  void release(DistStream, int) override {}
  GradTarget grad(const Parameter& parameter) override;
  void grads_ready(DistStream, int) override {}
  void begin_step(int64_t) override { contributions_.begin(); }
  void begin_micro_batch(bool) override {}
  void reduce_gradients(DistStream dist) override;
  void add_norm(DistStream dist, const Tensor& sum_1) override;
  std::span<const OptimizerRange> ranges() const override { return ranges_; }
  void publish(DistStream, int) override {}
  std::vector<StateSlice> saved() const override;
  std::vector<StateSlice> loaded() const override { return saved(); }

 private:
  ParameterSet& parameters_;
  ParamStoreOptions options_;
  GradContributions contributions_;
  Tensor values_, low_, buffers_, grads_, exp_avg_, exp_avg_sq_;
  std::vector<OptimizerRange> ranges_;
};

// One rank.
class LocalDistribution : public Distribution {
 public:
  const RankPlace& place() const override { return place_; }
  TensorParallel& tensor() override { return tensor_; }
  TokenDispatcher& dispatcher() override { return dispatcher_; }
  KvExchange& kv() override { return kv_; }
  SequenceSums& sequences() override { return sequences_; }
  std::unique_ptr<ParamStore> make_param_store(ParameterSet& parameters,
                                               const ParamStoreOptions& options) override {
    return std::make_unique<LocalParamStore>(parameters, options);
  }
  void sum_over_ranks(DistStream, const Tensor&) override {}

 private:
  RankPlace place_;
  LocalTensorParallel tensor_;
  LocalDispatcher dispatcher_;
  LocalKvExchange kv_;
  LocalSequenceSums sequences_;
};

}  // namespace dstrain
