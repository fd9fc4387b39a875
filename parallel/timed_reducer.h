// A reducer that also measures how long its calls keep the host.
#pragma once

#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "parallel/grad_reducer.h"

namespace dstrain {

class TimedReducer : public GradReducer {
 public:
  explicit TimedReducer(std::unique_ptr<GradReducer> reducer) : reducer_(std::move(reducer)) {}

  void make_memory(const OwnerVisitor& visit) override { reducer_->make_memory(visit); }
  void clear(DistStream dist) override { reducer_->clear(dist); }
  void begin_step(int64_t step) override { reducer_->begin_step(step); }
  void reduce_scatter(DistStream dist, int range, const Tensor& whole, const Tensor& shard) override {
    const Timer timer(reduce_seconds_, dist);
    reducer_->reduce_scatter(dist, range, whole, shard);
  }
  void all_gather(DistStream dist, int range, const Tensor& shard, const Tensor& whole) override {
    const Timer timer(gather_seconds_, dist);
    reducer_->all_gather(dist, range, shard, whole);
  }
  void end_step(DistStream dist, const StepScalars* scalars) override { reducer_->end_step(dist, scalars); }
  std::vector<StateSlice> saved() const override { return reducer_->saved(); }
  std::vector<StateSlice> loaded(const SavedKinds& kinds) const override { return reducer_->loaded(kinds); }
  GradTraffic traffic() const override {
    GradTraffic traffic = reducer_->traffic();
    traffic.reduce.seconds = reduce_seconds_;
    traffic.gather.seconds = gather_seconds_;
    return traffic;
  }

 private:
  class Timer {
   public:
    Timer(double& seconds, DistStream dist) : seconds_(seconds), counts_(!dist.dry) {}
    ~Timer() {
      const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin_;
      if (counts_) seconds_ += passed.count();
    }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

   private:
    double& seconds_;
    bool counts_;
    std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  };

  std::unique_ptr<GradReducer> reducer_;
  double reduce_seconds_ = 0, gather_seconds_ = 0;
};

}  // namespace dstrain
