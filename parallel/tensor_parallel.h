// Tensor and sequence parallelism over a communicator, and the sums over the ranks of a sequence
// (core/dist/dist_context.h). On host memory a start does all the work.
#pragma once

#include "core/dist/dist_context.h"

namespace dstrain {

class RankTensorParallel : public TensorParallel {
 public:
  explicit RankTensorParallel(Communicator& ranks) : ranks_(ranks) {}
  int rank() const override { return ranks_.rank(); }
  int size() const override { return ranks_.size(); }
  void gather_start(DistStream dist, const Tensor& x_tD, const Tensor& x_TD) override {
    if (!dist.dry) ranks_.all_gather(dist.stream, x_tD, x_TD);
  }
  void gather_finish(DistStream, const Tensor&, const Tensor&) override {}
  void reduce_scatter_start(DistStream dist, const Tensor& y_TD, const Tensor& out_tD) override {
    if (!dist.dry) ranks_.reduce_scatter_sum(dist.stream, y_TD, out_tD);
  }
  void reduce_scatter_finish(DistStream, const Tensor&, const Tensor&) override {}
  void all_reduce_sum(DistStream dist, const Tensor& x) override {
    if (!dist.dry) ranks_.all_reduce_sum(dist.stream, x);
  }
  void all_reduce_max(DistStream dist, const Tensor& x) override {
    if (!dist.dry) ranks_.all_reduce_max(dist.stream, x);
  }

 private:
  Communicator& ranks_;
};

class RankSequenceSums : public SequenceSums {
 public:
  explicit RankSequenceSums(Communicator& ranks) : ranks_(ranks) {}
  void reduce_start(DistStream dist, const Tensor& x) override {
    if (!dist.dry && ranks_.size() > 1) ranks_.all_reduce_sum(dist.stream, x);
  }
  void reduce_finish(DistStream, const Tensor&) override {}

 private:
  Communicator& ranks_;
};

}  // namespace dstrain
