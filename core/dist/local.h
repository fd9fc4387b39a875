// The single-rank versions of core/dist: nothing is sent, and what they return defines what the
// distributed versions must return.
#pragma once

#include <vector>

#include "core/dist/dist_context.h"

namespace dstrain {

class LocalTensorParallel : public TensorParallel {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void gather_start(DistStream, const Tensor&) override {}
  Tensor gather_finish(DistStream, const Tensor& x_TD, Arena&) override { return x_TD; }
  void reduce_scatter_start(DistStream, const Tensor&) override {}
  Tensor reduce_scatter_finish(DistStream, const Tensor& y_TD, Arena&) override { return y_TD; }
  void all_reduce_sum(DistStream, const Tensor&) override {}
  void all_reduce_max(DistStream, const Tensor&) override {}
};

// Experts read token rows through the sorted index; gathered rows are never stored.
class LocalDispatcher : public TokenDispatcher {
 public:
  int64_t num_local_experts(int64_t num_experts) const override { return num_experts; }
  int64_t max_rows(int64_t tokens, int64_t experts_per_token) const override {
    return tokens * experts_per_token;
  }
  void route(DistStream, int64_t num_experts, Routing& routing, Arena& keep) override;
  void dispatch_start(DistStream, const Tensor&, const Routing&) override {}
  ExpertRows dispatch_finish(DistStream, const Tensor& x_TD, const Routing& routing, Arena&) override {
    return {x_TD, routing.token_of_row_R};
  }
  void combine_start(DistStream, const Tensor&, const Routing&) override {}
  void combine_finish(DistStream dist, const Tensor& y_RD, const Routing& routing,
                      const Tensor& addend_TD, const Tensor& out_TD) override {
    dist.ops.combine_rows(dist.stream, y_RD, routing.row_of_slot_TK, addend_TD, out_TD);
  }
  void combine_backward_start(DistStream, const Tensor&, const Routing&) override {}
  ExpertRows combine_backward_finish(DistStream, const Tensor& dout_TD, const Routing& routing,
                                     Arena&) override {
    return {dout_TD, routing.token_of_row_R};
  }
  void dispatch_backward_start(DistStream, const Tensor&, const Tensor&, const Routing&) override {}
  void dispatch_backward_finish(DistStream, const Tensor& dx_RD, const Tensor& drow_weight_R,
                                const Routing& routing, const Tensor& addend_TD, const Tensor& dx_TD,
                                const Tensor& dweights_TK) override;
};

class LocalKvExchange : public KvExchange {
 public:
  void gather_start(DistStream, int, const Tensor&, const Tensor&) override {}
  KeysValues gather_finish(DistStream, int, const Tensor& k_TGQ, const Tensor& v_TGW,
                           const AttentionSegments& local, Arena&) override {
    return {k_TGQ, v_TGW, local};
  }
  void reduce_start(DistStream, int, const Tensor&, const Tensor&) override {}
  void reduce_finish(DistStream, int, const Tensor& dk_UGQ, const Tensor& dv_UGW, Tensor& dk_TGQ,
                     Tensor& dv_TGW, Arena&) override {
    dk_TGQ = dk_UGQ;
    dv_TGW = dv_UGW;
  }
};

// Values are always whole. The first contribution to a gradient after begin_step() overwrites what the
// last step left, later ones add.
class LocalParamStore : public ParamStore {
 public:
  explicit LocalParamStore(const ParameterSet& parameters);
  void begin_step();
  // Gradients without a contribution in this step are set to zero.
  void finish_step(DistStream dist);

  void acquire_start(DistStream, int) override {}
  void acquire_finish(DistStream, int) override {}
  void release(DistStream, int) override {}
  GradTarget grad(const Parameter& parameter) override;
  void grads_ready(DistStream, int) override {}
  void grads_wait(DistStream) override {}

 private:
  size_t index_of(const Parameter& parameter) const;
  const ParameterSet& parameters_;
  std::vector<std::pair<const Parameter*, bool>> written_;  // sorted by address
};

// A single-rank context with its parts.
struct LocalDist {
  explicit LocalDist(const ParameterSet& parameters) : params(parameters) {}
  LocalTensorParallel tensor;
  LocalDispatcher dispatcher;
  LocalKvExchange kv;
  LocalParamStore params;
  DistContext context() { return {tensor, dispatcher, kv, params}; }
};

}  // namespace dstrain
