#include "core/dist/local.h"

#include <algorithm>

namespace dstrain {

void LocalDispatcher::route(DistStream dist, int64_t num_experts, Routing& routing, Arena& keep) {
  const int64_t T = routing.indices_TK.size(0), K = routing.indices_TK.size(1);
  routing.offsets_E1 = keep.make(DType::i32, {num_experts + 1}, "expert offsets");
  routing.token_of_row_R = keep.make(DType::i32, {T * K}, "token of row");
  routing.row_of_slot_TK = keep.make(DType::i32, {T, K}, "row of slot");
  routing.row_weight_R = keep.make(routing.weights_TK.dtype(), {T * K}, "row weight");
  dist.ops.sort_by_expert(dist.stream, routing.indices_TK, routing.weights_TK, routing.offsets_E1,
                          routing.token_of_row_R, routing.row_of_slot_TK, routing.row_weight_R);
}

void LocalDispatcher::dispatch_backward_finish(DistStream dist, const Tensor& dx_RD,
                                               const Tensor& drow_weight_R, const Routing& routing,
                                               const Tensor& addend_TD, const Tensor& dx_TD,
                                               const Tensor& dweights_TK) {
  dist.ops.combine_rows(dist.stream, dx_RD, routing.row_of_slot_TK, addend_TD, dx_TD);
  const int64_t R = drow_weight_R.numel();
  dist.ops.gather_rows(dist.stream, drow_weight_R.view({R, 1}), routing.row_of_slot_TK.view({R}),
                       dweights_TK.view({R, 1}));
}

LocalParamStore::LocalParamStore(const ParameterSet& parameters) : parameters_(parameters) {
  for (const Parameter& p : parameters_.all())
    if (p.spec.trainable) written_.emplace_back(&p, false);
  std::sort(written_.begin(), written_.end());
}

size_t LocalParamStore::index_of(const Parameter& parameter) const {
  const auto at = std::lower_bound(written_.begin(), written_.end(), std::pair(&parameter, false));
  DSTRAIN_CHECK(at != written_.end() && at->first == &parameter,
                "no gradient for '" + parameter.spec.name + "'");
  return static_cast<size_t>(at - written_.begin());
}

void LocalParamStore::begin_step() {
  for (auto& [parameter, written] : written_) written = false;
}

GradTarget LocalParamStore::grad(const Parameter& parameter) {
  bool& written = written_[index_of(parameter)].second;
  const Accumulate accumulate = written ? Accumulate::add : Accumulate::overwrite;
  written = true;
  return {parameter.grad, accumulate};
}

void LocalParamStore::finish_step(DistStream dist) {
  for (auto& [parameter, written] : written_)
    if (!written) dist.ops.fill(dist.stream, parameter->grad, 0.0);
}

}  // namespace dstrain
