// Tensor and sequence parallelism over a communicator, and the sums over the ranks of a sequence
// (core/dist/dist_context.h). On host memory a start does all the work.
#pragma once

#include "core/dist/dist_context.h"
#include "parallel/exposed_time.h"

namespace dstrain {

class RankTensorParallel : public TensorParallel {
 public:
  RankTensorParallel(Communicator& ranks, ExposedTime& exposed)
      : ranks_(ranks), exposed_(exposed) {}
  int rank() const override { return ranks_.rank(); }
  int size() const override { return ranks_.size(); }
  void gather_start(DistStream dist, const Tensor& x_tD, const Tensor& x_TD) override {
    queue(dist, [&] { ranks_.all_gather(dist.stream, x_tD, x_TD); });
  }
  void gather_finish(DistStream, const Tensor&, const Tensor&) override {}
  void reduce_scatter_start(DistStream dist, const Tensor& y_TD, const Tensor& out_tD) override {
    queue(dist, [&] { ranks_.reduce_scatter_sum(dist.stream, y_TD, out_tD); });
  }
  void reduce_scatter_finish(DistStream, const Tensor&, const Tensor&) override {}
  void all_reduce_sum(DistStream dist, const Tensor& x) override {
    queue(dist, [&] { ranks_.all_reduce_sum(dist.stream, x); });
  }
  void all_reduce_max(DistStream dist, const Tensor& x) override {
    queue(dist, [&] { ranks_.all_reduce_max(dist.stream, x); });
  }

 private:
  template <class Call>
  void queue(DistStream dist, const Call& call) {
    if (!dist.dry) exposed_.on_computing(CommKind::tensor, dist.stream, call);
  }

  Communicator& ranks_;
  ExposedTime& exposed_;
};

class RankSequenceSums : public SequenceSums {
 public:
  // `kind`: whose time their sums are.
  RankSequenceSums(Communicator& ranks, ExposedTime& exposed, CommKind kind)
      : ranks_(ranks), exposed_(exposed), kind_(kind) {}
  void reduce_start(DistStream dist, const Tensor& x) override {
    if (dist.dry || ranks_.size() == 1) return;
    exposed_.on_computing(kind_, dist.stream, [&] { ranks_.all_reduce_sum(dist.stream, x); });
  }
  void reduce_finish(DistStream, const Tensor&) override {}

 private:
  Communicator& ranks_;
  ExposedTime& exposed_;
  const CommKind kind_;
};

}  // namespace dstrain
