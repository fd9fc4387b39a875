#include "core/dist/parameter.h"

#include <algorithm>
#include <utility>

#include "core/backend/ops.h"
#include "core/base/rng.h"

namespace dstrain {
namespace {

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  return n;
}

// The last two dims form the matrix that tiles cover.
int64_t alignment_of(const std::vector<int64_t>& shape) {
  const size_t n = shape.size();
  const bool tiled = n >= 2 && shape[n - 1] % 128 == 0 && shape[n - 2] % 128 == 0;
  return tiled ? ParameterSet::kTileAlignment : ParameterSet::kAlignment;
}

ReduceGroup reduce_group(const Parameter& p) {
  if (p.is_expert()) return ReduceGroup::expert;
  return p.is_tensor_cut() ? ReduceGroup::tensor_cut : ReduceGroup::replicated;
}

int64_t round_up(int64_t value, int64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace

int64_t Parameter::numel() const { return product(local_shape); }
int64_t Parameter::global_numel() const { return product(spec.shape); }

int64_t Parameter::global_index(int64_t i) const {
  int64_t index = 0, stride = 1;
  for (size_t d = local_shape.size(); d-- > 0;) {
    index += (i % local_shape[d] + local_begin[d]) * stride;
    i /= local_shape[d];
    stride *= spec.shape[d];
  }
  return index;
}

Parameter& ParameterSet::declare(ParameterSpec spec, const ShardPlace& place) {
  DSTRAIN_CHECK(!finished_, "parameters are declared before the layout is fixed");
  DSTRAIN_CHECK(find(spec.name) == nullptr, "parameter '" + spec.name + "' is declared twice");
  DSTRAIN_CHECK(spec.shard.tensor_dim < 0 || spec.shard.expert_dim < 0,
                "'" + spec.name + "' is cut over two axes");
  Parameter p;
  p.local_shape = spec.shape;
  p.local_begin.assign(spec.shape.size(), 0);
  auto cut = [&](int dim, const AxisPlace& axis) {
    if (dim < 0) return;
    const size_t at = static_cast<size_t>(dim);
    const int64_t size = spec.shape[at], part = (size + axis.size - 1) / axis.size;
    DSTRAIN_CHECK(spec.shard.uneven || size % axis.size == 0,
                  "dim " + std::to_string(dim) + " of '" + spec.name + "' does not divide over " +
                      std::to_string(axis.size) + " ranks");
    p.local_begin[at] = std::min(size, axis.rank * part);
    p.local_shape[at] = std::min(size, p.local_begin[at] + part) - p.local_begin[at];
  };
  cut(spec.shard.tensor_dim, place.tensor);
  cut(spec.shard.expert_dim, place.expert);
  by_name_.emplace(spec.name, parameters_.size());
  p.spec = std::move(spec);
  return parameters_.emplace_back(std::move(p));
}

Parameter* ParameterSet::find(const std::string& name) {
  return const_cast<Parameter*>(std::as_const(*this).find(name));
}

const Parameter* ParameterSet::find(const std::string& name) const {
  const auto at = by_name_.find(name);
  return at == by_name_.end() ? nullptr : &parameters_[at->second];
}

void ParameterSet::finish_layout() {
  finished_ = true;
  std::vector<Parameter*> order;
  for (Parameter& p : parameters_) {
    if (p.spec.trainable) {
      order.push_back(&p);
      continue;
    }
    p.offset = buffer_elements_;
    buffer_elements_ = round_up(buffer_elements_ + p.numel(), kAlignment);
  }
  auto key = [](const Parameter* p) {
    return std::tuple(p->spec.block, reduce_group(*p), !p->spec.weight_decay);
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](const Parameter* a, const Parameter* b) { return key(a) < key(b); });
  for (Parameter* p : order) {
    const bool same_group = !groups_.empty() && groups_.back().block == p->spec.block &&
                            groups_.back().reduce == reduce_group(*p) &&
                            groups_.back().weight_decay == p->spec.weight_decay;
    p->offset = round_up(trainable_elements_, alignment_of(p->local_shape));
    trainable_elements_ = round_up(p->offset + p->numel(), kAlignment);
    // A group takes the padding before its first parameter too, so that groups tile the whole range.
    if (same_group)
      groups_.back().end = trainable_elements_;
    else
      groups_.push_back({p->spec.block, reduce_group(*p), p->spec.weight_decay,
                         groups_.empty() ? 0 : groups_.back().end, trainable_elements_});
  }
}

void ParameterSet::bind(const Tensor& values, const Tensor& grads, const Tensor& buffers) {
  DSTRAIN_CHECK(finished_, "bind() needs the layout");
  values_ = values;
  buffers_ = buffers;
  auto slice = [](const Tensor& flat, const Parameter& p) {
    char* at = static_cast<char*>(flat.raw());
    if (at != nullptr) at += p.offset * dtype_bytes(flat.dtype());
    return Tensor(at, flat.dtype(), p.local_shape.data(), static_cast<int>(p.local_shape.size()));
  };
  for (Parameter& p : parameters_) {
    p.value = slice(p.spec.trainable ? values : buffers, p);
    p.grad = p.spec.trainable && grads.defined() ? slice(grads, p) : Tensor();
  }
}

void ParameterSet::initialize(Ops& ops, Stream& stream, uint64_t seed) {
  ops.fill(stream, values_, 0.0);
  ops.fill(stream, buffers_, 0.0);
  for (Parameter& p : parameters_)
    initialize_elements(ops, stream, p, 0, p.numel(), p.value.view({p.numel()}), seed);
}

void initialize_elements(Ops& ops, Stream& stream, const Parameter& p, int64_t begin, int64_t end,
                         const Tensor& data, uint64_t seed) {
  DSTRAIN_CHECK(data.numel() == end - begin, "elements of '" + p.spec.name + "' do not fit " + data.describe());
  if (p.spec.init != Init::normal) return ops.fill(stream, data, p.spec.init == Init::ones ? 1.0 : 0.0);
  Ops::SliceOf slice{.outer = 1, .global = 1, .begin = 0, .extent = 1, .inner = 1, .first = begin};
  const int dim = p.is_expert() ? p.spec.shard.expert_dim : std::max(0, p.spec.shard.tensor_dim);
  for (int d = 0; d < std::ssize(p.spec.shape); ++d) {
    const int64_t size = p.spec.shape[static_cast<size_t>(d)];
    (d < dim ? slice.outer : d == dim ? slice.global : slice.inner) *= size;
  }
  slice.begin = p.local_begin[static_cast<size_t>(dim)];
  slice.extent = p.local_shape[static_cast<size_t>(dim)];
  const uint64_t key = stream_id(p.spec.name.data(), p.spec.name.size());
  ops.fill_normal(stream, data, seed, key, p.spec.std, slice);
}

}  // namespace dstrain
