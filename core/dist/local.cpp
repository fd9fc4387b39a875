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

void LocalDispatcher::return_finish(DistStream dist, const ExpertRows&, const ExpertResults& results,
                                    const Routing& routing, const TokenResults& tokens) {
  dist.ops.combine_rows(dist.stream, results.y_RD, routing.row_of_slot_TK, tokens.addend_TD,
                        tokens.out_TD);
  if (!tokens.dweights_TK.defined()) return;
  const int64_t R = routing.row_of_slot_TK.numel();
  dist.ops.gather_rows(dist.stream, results.dweight_R1, routing.row_of_slot_TK.view({R}),
                       tokens.dweights_TK.view({R, 1}));
}

GradContributions::GradContributions(const ParameterSet& parameters) {
  for (const Parameter& p : parameters.all())
    if (p.spec.trainable) written_.emplace_back(&p, false);
  std::sort(written_.begin(), written_.end());
}

size_t GradContributions::index_of(const Parameter& parameter) const {
  const auto at = std::lower_bound(written_.begin(), written_.end(), std::pair(&parameter, false));
  DSTRAIN_CHECK(at != written_.end() && at->first == &parameter,
                "no gradient for '" + parameter.spec.name + "'");
  return static_cast<size_t>(at - written_.begin());
}

void GradContributions::begin() {
  for (auto& [parameter, written] : written_) written = false;
}

void GradContributions::begin(int block) {
  for (auto& [parameter, written] : written_)
    if (parameter->spec.block == block) written = false;
}

Accumulate GradContributions::next(const Parameter& parameter) {
  bool& written = written_[index_of(parameter)].second;
  const Accumulate accumulate = written ? Accumulate::add : Accumulate::overwrite;
  written = true;
  return accumulate;
}

LocalParamStore::LocalParamStore(ParameterSet& parameters, const ParamStoreOptions& options)
    : parameters_(parameters), options_(options), contributions_(parameters) {}

void LocalParamStore::make_memory(const OwnerVisitor& visit) {
  const int64_t N = parameters_.trainable_elements();
  const DType gradient = stat_dtype(options_.dtype);
  visit("parameters", MemoryKind::device, [&](Arena& a) {
    values_ = a.make(options_.dtype, {N}, "parameters");
    buffers_ = a.make(gradient, {parameters_.buffer_elements()}, "router bias");
  });
  if (options_.training) {
    visit("gradients", MemoryKind::device, [&](Arena& a) { grads_ = a.make(gradient, {N}, "gradients"); });
    visit("optimizer state", MemoryKind::device, [&](Arena& a) {
      if (options_.has_low()) low_ = a.make(DType::u16, {N}, "lower halves of parameters");
      exp_avg_ = a.make(options_.moment_dtype(), {N}, "first moment");
      exp_avg_sq_ = a.make(options_.moment_dtype(), {N}, "second moment");
    });
  }
  parameters_.bind(values_, grads_, buffers_);
  ranges_.clear();
  if (!options_.training) return;
  for (const ParameterGroup& group : parameters_.groups()) {
    auto part = [&](const Tensor& flat) {
      return flat.defined() ? flat.rows(group.begin, group.end) : Tensor();
    };
    ranges_.push_back({group.block, group.weight_decay, part(values_), part(grads_), part(exp_avg_),
                       part(exp_avg_sq_), part(low_)});
  }
}

void LocalParamStore::clear(DistStream dist) {
  for (const Tensor& x : {values_, low_, buffers_, grads_, exp_avg_, exp_avg_sq_})
    if (x.defined()) dist.ops.fill(dist.stream, x, 0.0);
}

GradTarget LocalParamStore::grad(const Parameter& parameter) {
  return {parameter.grad, contributions_.next(parameter)};
}

void LocalParamStore::reduce_gradients(DistStream dist) {
  for (const Parameter& p : parameters_.all())
    if (p.spec.trainable && !contributions_.any(p)) dist.ops.fill(dist.stream, p.grad, 0.0);
}

void LocalParamStore::add_norm(DistStream dist, const Tensor& sum_1) {
  for (const OptimizerRange& range : ranges_) dist.ops.add_sum_squares(dist.stream, range.grad, sum_1);
}

std::vector<StateSlice> LocalParamStore::saved() const {
  std::vector<StateSlice> out;
  for (const Parameter& p : parameters_.all()) {
    const int64_t n = p.numel();
    out.push_back({"param", &p, 0, n, p.value.view({n})});
    if (!p.spec.trainable || !options_.training) continue;
    if (low_.defined()) out.back().low = low_.rows(p.offset, p.offset + n);
    out.push_back({"adamw.exp_avg", &p, 0, n, exp_avg_.rows(p.offset, p.offset + n)});
    out.push_back({"adamw.exp_avg_sq", &p, 0, n, exp_avg_sq_.rows(p.offset, p.offset + n)});
  }
  return out;
}

}  // namespace dstrain
