// Sums of gradients with another method for each range, as compression.method auto chooses.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "parallel/grad_reducer.h"
#include "parallel/residual_state.h"

namespace dstrain {

// Hands each range to the reducer of its method.
class ChosenReducer : public GradReducer {
 public:
  struct Place {
    size_t part = 0;
    int range = 0;  // there
  };
  ChosenReducer(std::vector<std::unique_ptr<GradReducer>> parts, std::vector<Place> places)
      : parts_(std::move(parts)), places_(std::move(places)) {}

  void make_memory(const OwnerVisitor& visit) override;
  void clear(DistStream dist) override;
  void begin_step(int64_t step) override;
  void reduce_scatter(DistStream dist, int range, const Tensor& whole,
                      const Tensor& shard) override;
  void all_gather(DistStream dist, int range, const Tensor& shard, const Tensor& whole) override;
  void end_step(DistStream dist, const StepScalars* scalars) override;
  std::vector<StateSlice> saved() const override;
  std::vector<StateSlice> loaded(const SavedKinds& kinds) const override;
  GradTraffic traffic() const override;

 private:
  const std::vector<std::unique_ptr<GradReducer>> parts_;
  const std::vector<Place> places_;  // by range
};

// Whole sums of ranges that were compressed before: what a checkpoint holds of their gradients that
// was not sent is added to the first sum. Each owner keeps the sum over ranks for its shard, and
// its memory to the end of the run.
class LeftoverReducer : public GradReducer {
 public:
  LeftoverReducer(std::unique_ptr<GradReducer> sums, Communicator& ranks,
                  const ParameterSet& parameters, const std::vector<GradRange>& ranges);

  void make_memory(const OwnerVisitor& visit) override;
  void clear(DistStream dist) override;
  void begin_step(int64_t step) override { sums_->begin_step(step); }
  void reduce_scatter(DistStream dist, int range, const Tensor& whole,
                      const Tensor& shard) override;
  void all_gather(DistStream dist, int range, const Tensor& shard, const Tensor& whole) override {
    sums_->all_gather(dist, range, shard, whole);
  }
  void end_step(DistStream dist, const StepScalars* scalars) override {
    sums_->end_step(dist, scalars);
  }
  std::vector<StateSlice> saved() const override;
  std::vector<StateSlice> loaded(const SavedKinds& kinds) const override;
  GradTraffic traffic() const override { return sums_->traffic(); }

 private:
  struct Range {
    PieceLayout layout;
    int64_t at = 0;          // in leftovers_
    bool is_pending = true;  // not added yet
  };
  Tensor leftover_of(const Range& range) const {
    return leftovers_.rows(range.at, range.at + range.layout.shard);
  }

  const std::unique_ptr<GradReducer> sums_;
  Communicator& ranks_;
  const ParameterSet& parameters_;
  std::vector<Range> ranges_;
  int64_t elements_ = 0;
  Tensor leftovers_;  // f32
};

// `methods`: of kSumMethods, by range. `kinds` (may be empty): of the checkpoint that the job goes
// on from. Otherwise as make_grad_reducer().
std::unique_ptr<GradReducer> make_chosen_reducer(const GradReducerOptions& options,
                                                 const std::vector<CompressionMethod>& methods,
                                                 const SavedKinds& kinds, const ReduceRanks& ranks,
                                                 const ParameterSet& parameters,
                                                 const std::vector<GradRange>& ranges);

}  // namespace dstrain
