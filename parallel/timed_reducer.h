// A reducer whose calls are measured.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "parallel/grad_reducer.h"
#include "parallel/reduce_times.h"

namespace dstrain {

class TimedReducer : public GradReducer {
 public:
  // Reducers of one rank may share `times`, which outlives them; their traffic() has no seconds.
  TimedReducer(std::unique_ptr<GradReducer> reducer, ReduceTimes& times)
      : reducer_(std::move(reducer)), times_(times) {}

  void make_memory(const OwnerVisitor& visit) override { reducer_->make_memory(visit); }
  void clear(DistStream dist) override { reducer_->clear(dist); }
  void begin_step(int64_t step) override {
    times_.begin_step(step);
    reducer_->begin_step(step);
  }
  void reduce_scatter(DistStream dist, int range, const Tensor& whole,
                      const Tensor& shard) override {
    measure(&ReduceSeconds::reduce, dist,
            [&] { reducer_->reduce_scatter(dist, range, whole, shard); });
  }
  void all_gather(DistStream dist, int range, const Tensor& shard, const Tensor& whole) override {
    measure(&ReduceSeconds::gather, dist, [&] { reducer_->all_gather(dist, range, shard, whole); });
  }
  void end_step(DistStream dist, const StepScalars* scalars) override {
    reducer_->end_step(dist, scalars);
  }
  std::vector<StateSlice> saved() const override { return reducer_->saved(); }
  std::vector<StateSlice> loaded(const SavedKinds& kinds) const override {
    return reducer_->loaded(kinds);
  }
  GradTraffic traffic() const override { return reducer_->traffic(); }

 private:
  template <class Call>
  void measure(double ReduceSeconds::*phase, DistStream dist, const Call& call) {
    if (dist.dry) return call();
    times_.measure(phase, dist.stream, call);
  }

  std::unique_ptr<GradReducer> reducer_;
  ReduceTimes& times_;
};

}  // namespace dstrain
