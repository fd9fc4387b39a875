// The parameters of a model part that several ranks hold together (ZeRO stages 0 to 3): values,
// gradients and moments by the flat ranges of shard_layout.h. LocalParamStore defines what is
// correct. Lower halves of bf16 values lie with the moments and never travel.
#pragma once

#include <vector>

#include "core/dist/param_store.h"
#include "parallel/comm_queue.h"
#include "parallel/shard_grads.h"
#include "parallel/shard_layout.h"
#include "parallel/shard_values.h"

namespace dstrain {

// Whom a rank shares its parameters with; communicators outlive the store.
struct ShardRanks {
  GroupComms groups = {};        // by ReduceGroup; `replicated` is all ranks of the pipeline stage
  Communicator* ties = nullptr;  // first and last pipeline stage; null where nothing is tied
  GroupPlaces places() const;
};

// Every rank of a group makes the same calls in the same order. With ZeRO 3, Parameter::value is
// absent outside of acquire and release; with sharded gradients, Parameter::grad always is.
// Thread-compatible.
class ParamShards : public ParamStore {
 public:
  // `parameters` has its layout; it, the backend and `exposed` outlive the store.
  ParamShards(Backend& backend, ParameterSet& parameters, const ParamStoreOptions& options,
              const ZeroOptions& zero, const ShardRanks& ranks, const ReducerFactory& make_reducer,
              ExposedTime& exposed);

  void make_memory(const OwnerVisitor& visit) override;
  void clear(DistStream dist) override;
  void acquire_start(DistStream dist, int block) override { values_.acquire_start(dist, block); }
  void acquire_finish(DistStream dist, int block) override;
  void release(DistStream, int block) override { values_.release(block); }
  GradTarget grad(const Parameter& parameter) override { return grads_->grad(parameter); }
  void grads_ready(DistStream dist, int block) override { grads_->grads_ready(dist, block); }
  void begin_step(int64_t step) override { grads_->begin_step(step); }
  void begin_micro_batch(bool last) override { grads_->begin_micro_batch(last); }
  void reduce_gradients(DistStream dist) override { grads_->reduce(dist); }
  void add_norm(DistStream dist, const Tensor& sum_1) override;
  std::span<const OptimizerRange> ranges() const override { return ranges_; }
  void publish(DistStream dist, int block) override { values_.publish(dist, block); }
  void end_step(DistStream dist, const StepScalars* scalars) override {
    grads_->end_step(dist, scalars);
  }
  std::vector<StateSlice> saved() const override;
  std::vector<StateSlice> loaded() const override;
  void begin_state_copy(DistStream copies) override {
    if (grads_) grads_->begin_state_copy(copies);
  }
  void hold_state(Event& copied) override {
    if (grads_) grads_->hold_state(copied);
  }
  // What is to be read after loaded(), in this order: see GradReducer::loaded().
  std::vector<StateSlice> loaded_residuals(const SavedKinds& kinds) const;

  // What make_memory asks for, without the reducers' own.
  ShardBytes bytes() const;
  GradTraffic traffic() const { return grads_ ? grads_->traffic() : GradTraffic(); }

 private:
  RangePart updated(const ShardRange& range) const;
  // Of moments or lower halves of values, a part that this rank has; absent where there are none.
  Tensor owner_state(const Tensor& flat, const ShardRange& range, RangePart part) const;
  void make_ranges();
  // Values with their lower halves where this rank has these.
  void add_masters(std::vector<StateSlice>& out, const ShardRange& range, RangePart part) const;
  void add_moments(std::vector<StateSlice>& out, const ShardRange& range, RangePart part) const;
  void add_buffers(std::vector<StateSlice>& out) const;

  ParameterSet& parameters_;
  const ParamStoreOptions options_;
  const ZeroOptions zero_;
  const ShardRanks ranks_of_group_;
  const ShardLayout layout_;
  CommQueue queue_;
  ShardValues values_;
  std::unique_ptr<ShardGrads> grads_;  // where there is training
  Tensor buffers_;
  Tensor low_, exp_avg_, exp_avg_sq_;  // of updated() parts
  std::vector<OptimizerRange> ranges_;
};

}  // namespace dstrain
