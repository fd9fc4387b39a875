#include "parallel/param_shards.h"

#include <iterator>
#include <utility>

namespace dstrain {
namespace {

// data and low (may be absent): of the part.
void add_slices(std::vector<StateSlice>& out, const char* kind, const ShardRange& range,
                RangePart part, const Tensor& data, const Tensor& low = {}) {
  for (const ParameterPart& of : range.parameters_in(part)) {
    const int64_t at = of.at - part.begin, end = at + of.end - of.begin;
    out.push_back({kind, of.parameter, of.begin, of.end, data.rows(at, end)});
    if (low.defined()) out.back().low = low.rows(at, end);
  }
}

}  // namespace

GroupPlaces ShardRanks::places() const {
  GroupPlaces places;
  for (size_t g = 0; g < kReduceGroups; ++g) places[g] = {groups[g]->rank(), groups[g]->size()};
  return places;
}

ParamShards::ParamShards(Backend& backend, ParameterSet& parameters,
                         const ParamStoreOptions& options, const ZeroOptions& zero,
                         const ShardRanks& ranks, const ReducerFactory& make_reducer,
                         ExposedTime& exposed)
    : parameters_(parameters),
      options_(options),
      zero_(zero),
      ranks_of_group_(ranks),
      layout_(parameters, ranks.places(), zero.head_block),
      queue_(backend, exposed),
      values_(backend, layout_, ranks.groups, queue_, zero, options.dtype) {
  DSTRAIN_CHECK(zero.stage >= 0 && zero.stage <= 3, "ZeRO has stages 0 to 3");
  if (options.training)
    grads_ = std::make_unique<ShardGrads>(backend, parameters, layout_, make_reducer, ranks.ties,
                                          queue_, zero, options.dtype);
}

void ParamShards::make_memory(const OwnerVisitor& visit) {
  const DType stat = stat_dtype(options_.dtype);
  values_.make_memory(visit);
  visit("router bias", MemoryKind::device,
        [&](Arena& a) { buffers_ = a.make(stat, {parameters_.buffer_elements()}, "router bias"); });
  for (Parameter& p : parameters_.all())
    if (!p.spec.trainable)
      p.value = Tensor(buffers_.rows(p.offset, p.offset + p.numel()).raw(), stat,
                       p.local_shape.data(), static_cast<int>(p.local_shape.size()));
  if (!options_.training) return;
  grads_->make_memory(visit);
  const int64_t moments =
      zero_.shards_moments() ? layout_.shard_elements() : layout_.whole_elements();
  visit("optimizer state", MemoryKind::device, [&](Arena& a) {
    if (options_.has_low()) low_ = a.make(DType::u16, {moments}, "lower halves of parameters");
    exp_avg_ = a.make(options_.moment_dtype(), {moments}, "first moment");
    exp_avg_sq_ = a.make(options_.moment_dtype(), {moments}, "second moment");
  });
  make_ranges();
}

ShardBytes ParamShards::bytes() const {
  return bytes_per_rank(layout_, parameters_.buffer_elements(), zero_, options_);
}

// Stage 0 updates everything everywhere.
RangePart ParamShards::updated(const ShardRange& range) const {
  return zero_.shards_moments() ? range.owned() : range.all();
}

Tensor ParamShards::owner_state(const Tensor& flat, const ShardRange& range, RangePart part) const {
  if (!flat.defined()) return {};
  const int64_t start =
      zero_.shards_moments() ? range.shard_at - range.owned().begin : range.whole_at;
  return flat.rows(start + part.begin, start + part.end);
}

void ParamShards::make_ranges() {
  ranges_.clear();
  for (const ShardRange& range : layout_.ranges()) {
    const RangePart part = updated(range);
    if (part.elements() == 0) continue;
    const bool sharded = zero_.shards_moments();
    ranges_.push_back(
        {range.group.block, range.group.weight_decay,
         sharded ? values_.owned(range) : values_.whole(range).rows(0, range.elements()),
         sharded ? grads_->owned(range) : grads_->whole(range), owner_state(exp_avg_, range, part),
         owner_state(exp_avg_sq_, range, part), owner_state(low_, range, part)});
  }
}

void ParamShards::clear(DistStream dist) {
  values_.clear(dist);
  if (grads_) grads_->clear(dist);
  for (const Tensor& x : {buffers_, low_, exp_avg_, exp_avg_sq_})
    if (x.defined()) dist.ops.fill(dist.stream, x, 0.0);
}

void ParamShards::acquire_finish(DistStream dist, int block) {
  values_.acquire_finish(dist, block);
  if (grads_) grads_->set_caller(dist);
}

// Each rank adds what it owns, in every stage. A tied table counts where its owner is.
void ParamShards::add_norm(DistStream dist, const Tensor& sum_1) {
  for (const ShardRange& range : layout_.ranges()) {
    const Tensor owned = grads_->owned(range);
    if (range.tie != Tie::copy && owned.numel() > 0)
      dist.ops.add_sum_squares(dist.stream, owned, sum_1);
  }
}

void ParamShards::add_masters(std::vector<StateSlice>& out, const ShardRange& range,
                              RangePart part) const {
  const Tensor values = zero_.shards_values() ? values_.owned(range)
                                              : values_.whole(range).rows(part.begin, part.end);
  add_slices(out, "param", range, part, values, owner_state(low_, range, part));
}

void ParamShards::add_moments(std::vector<StateSlice>& out, const ShardRange& range,
                              RangePart part) const {
  if (!options_.training) return;
  add_slices(out, "adamw.exp_avg", range, part, owner_state(exp_avg_, range, part));
  add_slices(out, "adamw.exp_avg_sq", range, part, owner_state(exp_avg_sq_, range, part));
}

void ParamShards::add_buffers(std::vector<StateSlice>& out) const {
  for (const Parameter& p : parameters_.all())
    if (!p.spec.trainable) out.push_back({"param", &p, 0, p.numel(), p.value.view({p.numel()})});
}

std::vector<StateSlice> ParamShards::saved() const {
  std::vector<StateSlice> out;
  for (const ShardRange& range : layout_.ranges()) {
    if (range.tie == Tie::copy) continue;
    add_masters(out, range, range.owned());
    add_moments(out, range, range.owned());
  }
  if (ranks_of_group_.groups[number_of(ReduceGroup::replicated)]->rank() == 0) add_buffers(out);
  if (grads_) std::ranges::move(grads_->saved_residuals(), std::back_inserter(out));
  return out;
}

std::vector<StateSlice> ParamShards::loaded() const {
  std::vector<StateSlice> out;
  for (const ShardRange& range : layout_.ranges()) {
    const RangePart mine = updated(range), all = range.all();
    add_masters(out, range, mine);
    add_moments(out, range, mine);
    if (zero_.shards_values()) continue;
    // Others update the rest, of which values alone are here.
    for (const RangePart rest : {RangePart{0, mine.begin}, RangePart{mine.end, all.end}})
      if (rest.elements() > 0)
        add_slices(out, "param", range, rest, values_.whole(range).rows(rest.begin, rest.end));
  }
  add_buffers(out);
  return out;
}

std::vector<StateSlice> ParamShards::loaded_residuals(const SavedKinds& kinds) const {
  return grads_ ? grads_->loaded_residuals(kinds) : std::vector<StateSlice>();
}

}  // namespace dstrain
