// Sums of all elements of gradients: over all ranks at once or in two levels, in f32 or in bf16.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel/grad_reducer.h"

namespace dstrain {

// Counts calls of one communicator whose peers get equally many bytes each.
class TrafficMeter {
 public:
  // `elsewhere`: ranks of the communicator on other nodes.
  TrafficMeter(const Communicator& comm, int elsewhere) : comm_(comm), elsewhere_(elsewhere) {}

  // Runs call() and adds what it sent, and what the fp32 call over shards of this size would have.
  template <class Call>
  void count(PhaseTraffic& phase, int64_t shard, const Call& call) const {
    const int64_t peers = comm_.size() - 1, before = comm_.bytes_sent();
    call();
    const int64_t sent = comm_.bytes_sent() - before;
    phase.sent += sent;
    phase.baseline += peers * shard * 4;
    phase.sent_between_nodes += peers > 0 ? sent / peers * elsewhere_ : 0;
    phase.baseline_between_nodes += int64_t{elsewhere_} * shard * 4;
  }

 private:
  const Communicator& comm_;
  int elsewhere_;
};

class DenseReducer : public GradReducer {
 public:
  DenseReducer(Communicator& comm, int elsewhere) : comm_(comm), meter_(comm, elsewhere) {}

  void make_memory(const OwnerVisitor&) override {}
  void begin_step(int64_t) override {}
  void reduce_scatter(DistStream dist, int, const Tensor& whole, const Tensor& shard) override {
    if (dist.dry) return;
    meter_.count(traffic_.reduce, shard.numel(),
                 [&] { comm_.reduce_scatter_sum(dist.stream, whole, shard); });
  }
  void all_gather(DistStream dist, int, const Tensor& shard, const Tensor& whole) override {
    if (dist.dry) return;
    meter_.count(traffic_.gather, shard.numel(),
                 [&] { comm_.all_gather(dist.stream, shard, whole); });
  }
  void end_step(DistStream, const StepScalars*) override {}
  GradTraffic traffic() const override { return traffic_; }

 private:
  Communicator& comm_;
  TrafficMeter meter_;
  GradTraffic traffic_;
};

// With J nodes of L ranks, the ranks of a node first sum among themselves, so that rank l of each
// node holds its node's sum of the J pieces j * L + l; then the ranks with the same l sum these, by
// a reducer of their own. A rank sends (J - 1) shards to other nodes, where one level sends (J - 1)
// * L.
class HierarchicalReducer : public GradReducer {
 public:
  HierarchicalReducer(Communicator& intra, int nodes, DType dtype,
                      const std::vector<GradRange>& ranges, std::unique_ptr<GradReducer> inter);

  void make_memory(const OwnerVisitor& visit) override;
  void clear(DistStream dist) override { inter_->clear(dist); }
  void begin_step(int64_t step) override { inter_->begin_step(step); }
  void reduce_scatter(DistStream dist, int range, const Tensor& whole,
                      const Tensor& shard) override;
  void all_gather(DistStream dist, int range, const Tensor& shard, const Tensor& whole) override;
  void end_step(DistStream dist, const StepScalars* scalars) override {
    inter_->end_step(dist, scalars);
  }
  std::vector<StateSlice> saved() const override { return inter_->saved(); }
  std::vector<StateSlice> loaded(const SavedKinds& kinds) const override {
    return inter_->loaded(kinds);
  }
  GradTraffic traffic() const override;

 private:
  // Of `whole`: the pieces of node j.
  Tensor node_pieces(const Tensor& whole, int64_t shard, int node) const;

  Communicator& intra_;
  const int nodes_;
  const DType dtype_;
  int64_t largest_shard_ = 0;
  std::unique_ptr<GradReducer> inter_;
  Tensor node_sums_;     // one piece per node
  GradTraffic traffic_;  // inside the node; baselines of both levels
};

// Sums of f32 gradients that travel in bf16. Each rank rounds its elements, to nearest even;
// another reducer sums those, which rounds wherever it adds up; what comes of it is f32 again.
// Gathered sums are rounded for their owner as for all others. One whole range lies here in bf16.
class Bf16Reducer : public GradReducer {
 public:
  // `sums` keeps no state from step to step.
  Bf16Reducer(std::unique_ptr<GradReducer> sums, const Communicator& ranks,
              const std::vector<GradRange>& ranges);

  void make_memory(const OwnerVisitor& visit) override;
  void begin_step(int64_t step) override { sums_->begin_step(step); }
  void reduce_scatter(DistStream dist, int range, const Tensor& whole,
                      const Tensor& shard) override;
  void all_gather(DistStream dist, int range, const Tensor& shard, const Tensor& whole) override;
  void end_step(DistStream dist, const StepScalars* scalars) override {
    sums_->end_step(dist, scalars);
  }
  GradTraffic traffic() const override { return sums_->traffic(); }

 private:
  Tensor own_part(const Tensor& rounded) const;

  const std::unique_ptr<GradReducer> sums_;
  const Communicator& ranks_;
  int64_t largest_whole_ = 0;
  Tensor rounded_;  // bf16
};

}  // namespace dstrain
