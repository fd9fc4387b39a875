// A ParamStore that checks how layers, models and engines use another one:
//  - values are there between acquire and release alone: outside they are NaN;
//  - what was acquired is released before the micro-batch ends;
//  - each block says once per micro-batch that its gradients are ready, after a contribution to
//  each of its
//    parameters and before none.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/dist/param_store.h"

namespace dstrain::test {

class StrictParamStore : public ParamStore {
 public:
  StrictParamStore(std::unique_ptr<ParamStore> inner, ParameterSet& parameters);

  // The backward of a micro-batch is over; in one part or in two, with begin_micro_batch before
  // each.
  void end_micro_batch();
  const std::vector<std::string>& faults() const { return faults_; }
  int64_t contributions() const { return contributions_; }  // so far
  int64_t acquires() const { return acquires_; }

  void make_memory(const OwnerVisitor& visit) override;
  void clear(DistStream dist) override;
  void acquire_start(DistStream dist, int block) override { inner_->acquire_start(dist, block); }
  void acquire_finish(DistStream dist, int block) override;
  void release(DistStream dist, int block) override;
  GradTarget grad(const Parameter& parameter) override;
  void grads_ready(DistStream dist, int block) override;
  void begin_step(int64_t step) override;
  void begin_micro_batch(bool last_of_step) override;
  void reduce_gradients(DistStream dist) override { inner_->reduce_gradients(dist); }
  void add_norm(DistStream dist, const Tensor& sum_1) override { inner_->add_norm(dist, sum_1); }
  std::span<const OptimizerRange> ranges() const override { return inner_->ranges(); }
  void publish(DistStream dist, int block) override { inner_->publish(dist, block); }
  void end_step(DistStream dist, const StepScalars* scalars) override {
    inner_->end_step(dist, scalars);
  }
  std::vector<StateSlice> saved() const override;
  std::vector<StateSlice> loaded() const override;
  void begin_state_copy(DistStream copies) override { inner_->begin_state_copy(copies); }
  void hold_state(Event& copied) override { inner_->hold_state(copied); }

 private:
  struct Block {
    std::vector<Parameter*> parameters;  // trainable
    int acquired = 0;
    int ready = 0;  // in this micro-batch
  };
  struct Use {
    Tensor value;              // while it is hidden
    bool contributed = false;  // in this micro-batch
  };

  Block& block_at(int block) { return blocks_.at(block); }
  void fault(const std::string& text) { faults_.push_back(text); }
  void show(const Block& block) const;
  void hide(const Block& block) const;
  std::vector<StateSlice> with_values(std::vector<StateSlice> (ParamStore::*slices)() const) const;

  std::unique_ptr<ParamStore> inner_;
  std::map<int, Block> blocks_;
  mutable std::map<const Parameter*, Use> uses_;
  Tensor poison_;
  bool in_backward_ = false;
  std::vector<std::string> faults_;
  int64_t contributions_ = 0, acquires_ = 0;
};

}  // namespace dstrain::test
