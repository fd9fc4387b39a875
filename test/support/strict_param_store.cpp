#include "test/support/strict_param_store.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace dstrain::test {
namespace {

std::string text_of(int block) {
  return "block " + std::to_string(block);
}

}  // namespace

StrictParamStore::StrictParamStore(std::unique_ptr<ParamStore> inner, ParameterSet& parameters)
    : inner_(std::move(inner)) {
  for (Parameter& p : parameters.all()) {
    if (!p.spec.trainable) continue;
    blocks_[p.spec.block].parameters.push_back(&p);
    uses_[&p] = {};
  }
}

void StrictParamStore::make_memory(const OwnerVisitor& visit) {
  inner_->make_memory(visit);
  DType dtype = DType::f32;
  int64_t largest = 0;
  for (const auto& [p, use] : uses_) {
    largest = std::max(largest, p->numel());
    if (p->value.defined()) dtype = p->value.dtype();
  }
  visit("hidden values", MemoryKind::device,
        [&](Arena& a) { poison_ = a.make(dtype, {largest}, "NaN"); });
  for (const auto& [number, block] : blocks_) hide(block);
}

void StrictParamStore::clear(DistStream dist) {
  inner_->clear(dist);
  dist.ops.fill(dist.stream, poison_, std::numeric_limits<double>::quiet_NaN());
}

// The inner store may have bound the values itself.
void StrictParamStore::show(const Block& block) const {
  for (Parameter* p : block.parameters)
    if (p->value.raw() == poison_.raw()) p->value = uses_.at(p).value;
}

void StrictParamStore::hide(const Block& block) const {
  for (Parameter* p : block.parameters) {
    uses_.at(p).value = p->value;
    p->value = Tensor(poison_.raw(), poison_.dtype(), p->local_shape.data(),
                      static_cast<int>(p->local_shape.size()));
  }
}

void StrictParamStore::acquire_finish(DistStream dist, int number) {
  Block& block = block_at(number);
  inner_->acquire_finish(dist, number);
  if (block.acquired++ == 0) show(block);
  ++acquires_;
}

void StrictParamStore::release(DistStream dist, int number) {
  Block& block = block_at(number);
  if (block.acquired == 0) return fault(text_of(number) + " is released but not acquired");
  inner_->release(dist, number);
  if (--block.acquired == 0) hide(block);
}

GradTarget StrictParamStore::grad(const Parameter& parameter) {
  const int number = parameter.spec.block;
  if (in_backward_ && block_at(number).ready > 0)
    fault("a contribution to '" + parameter.spec.name + "' comes after " + text_of(number) +
          " was ready");
  uses_.at(&parameter).contributed = true;
  ++contributions_;
  return inner_->grad(parameter);
}

void StrictParamStore::grads_ready(DistStream dist, int number) {
  if (dist.dry) return inner_->grads_ready(dist, number);  // it has no begin_micro_batch
  Block& block = block_at(number);
  if (!in_backward_) fault(text_of(number) + " is ready outside of a backward");
  if (++block.ready > 1) fault(text_of(number) + " is ready twice");
  for (const Parameter* p : block.parameters)
    if (!uses_.at(p).contributed)
      fault(text_of(number) + " is ready without a contribution to '" + p->spec.name + "'");
  inner_->grads_ready(dist, number);
}

void StrictParamStore::begin_step(int64_t step) {
  inner_->begin_step(step);
  for (auto& [number, block] : blocks_) block.ready = 0;
  for (auto& [p, use] : uses_) use.contributed = false;
  in_backward_ = false;
}

void StrictParamStore::begin_micro_batch(bool last_of_step) {
  in_backward_ = true;
  inner_->begin_micro_batch(last_of_step);
}

void StrictParamStore::end_micro_batch() {
  for (auto& [number, block] : blocks_) {
    if (block.ready == 0) fault(text_of(number) + " was never ready");
    if (block.acquired != 0) fault(text_of(number) + " is not released");
    block.ready = 0;
  }
  for (auto& [p, use] : uses_) use.contributed = false;
  in_backward_ = false;
}

// LocalParamStore makes slices of Parameter::value.
std::vector<StateSlice> StrictParamStore::with_values(
    std::vector<StateSlice> (ParamStore::*slices)() const) const {
  for (const auto& [number, block] : blocks_) show(block);
  std::vector<StateSlice> out = (*inner_.*slices)();
  for (const auto& [number, block] : blocks_)
    if (block.acquired == 0) hide(block);
  return out;
}

std::vector<StateSlice> StrictParamStore::saved() const {
  return with_values(&ParamStore::saved);
}
std::vector<StateSlice> StrictParamStore::loaded() const {
  return with_values(&ParamStore::loaded);
}

}  // namespace dstrain::test
