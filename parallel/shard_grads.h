// The gradients of shared parameters, from the layers' contributions to sums over ranks and
// micro-batches.
//
// Whole (ZeRO 0 and 1, or keep_full_grads): every rank adds up its micro-batches, and each block is
// summed over ranks when the last micro-batch is done with it. A rank's shard stays at its place in
// the whole. Sharded: whole gradients exist only for the blocks in flight, in slots. They are
// summed over ranks after each micro-batch, or earlier where another block needs the slot, and the
// shards add up.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "core/dist/communicator.h"
#include "core/dist/local.h"
#include "parallel/comm_queue.h"
#include "parallel/grad_reducer.h"
#include "parallel/shard_layout.h"

namespace dstrain {

// Makes what sums the gradients of one ReduceGroup; called where there are any.
using ReducerFactory = std::function<std::unique_ptr<GradReducer>(ReduceGroup, const ParameterSet&,
                                                                  std::vector<GradRange>)>;

// Calls are those of ParamStore. Sums run on the queue; reduce() makes the caller's stream wait for
// all of them. Thread-compatible.
class ShardGrads {
 public:
  // ties: the first and the last pipeline stage, in this order; null where nothing is tied.
  ShardGrads(Backend& backend, const ParameterSet& parameters, const ShardLayout& layout,
             const ReducerFactory& make_reducer, Communicator* ties, CommQueue& queue,
             const ZeroOptions& zero, DType dtype);

  void make_memory(const OwnerVisitor& visit);
  void clear(DistStream dist);

  void begin_step(int64_t step);
  void begin_micro_batch(bool last_of_step) { last_micro_batch_ = last_of_step; }
  // The stream on which the layers' calls from now on write gradients: grad() is not told.
  void set_caller(DistStream dist) { caller_.emplace(dist); }
  GradTarget grad(const Parameter& parameter);
  void grads_ready(DistStream dist, int block);
  void reduce(DistStream dist);
  void end_step(DistStream dist, const StepScalars* scalars);

  // After reduce(): the whole range (ZeRO 0), and elements owned() of it.
  Tensor whole(const ShardRange& range) const;
  Tensor owned(const ShardRange& range) const;

  std::vector<StateSlice> saved_residuals() const;
  std::vector<StateSlice> loaded_residuals(const SavedKinds& kinds) const;
  // See ParamStore; what is saved are residuals.
  void begin_state_copy(DistStream copies) { step_ended_.wait(copies); }
  void hold_state(Event& copied);
  GradTraffic traffic() const;

 private:
  struct Slot {
    explicit Slot(Backend& backend) : summed(backend) {}
    Tensor data;
    int block = -1;    // whose contributions it holds
    CommPoint summed;  // it may be overwritten
  };
  struct RangeState {
    bool contributed = false;  // since its last sum
    bool summed = false;       // at least once in this step
  };

  bool gathers() const { return zero_.stage == 0; }
  // The queue, behind copies of the residuals.
  DistStream queue_after(DistStream dist);
  GradReducer& reducer_of(const ShardRange& range) const {
    return *reducers_[number_of(range.group.reduce)];
  }
  // The whole range that contributions go to.
  Tensor contributions_of(const ShardRange& range) const;
  Tensor shard(const ShardRange& range) const;  // with its padding
  void take_slot(const ShardBlock& block);
  void sum_block(DistStream dist, const ShardBlock& block);
  void sum_range(DistStream comm, size_t index);
  void zero_rest(DistStream comm, const ShardRange& range, const Tensor& whole) const;
  void sum_ties(DistStream comm);

  const ParameterSet& parameters_;
  const ShardLayout& layout_;
  Communicator* const ties_;
  CommQueue& queue_;
  const ZeroOptions zero_;
  const DType dtype_;
  std::array<std::unique_ptr<GradReducer>, kReduceGroups> reducers_;

  GradContributions contributions_;
  Tensor grads_;  // whole ranges, or the sums of this rank's shards
  std::vector<Slot> slots_;
  std::vector<RangeState> states_;  // in the order of layout_.ranges()
  CommPoint all_summed_, step_ended_;
  Event* residuals_are_copied_ = nullptr;  // what the next sums wait for
  std::optional<DistStream> caller_;
  bool last_micro_batch_ = false;
};

}  // namespace dstrain
