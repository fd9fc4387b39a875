#include "parallel/shard_grads.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

namespace dstrain {

ShardGrads::ShardGrads(Backend& backend, const ParameterSet& parameters, const ShardLayout& layout,
                       const ReducerFactory& make_reducer, Communicator* ties, CommQueue& queue,
                       const ZeroOptions& zero, DType dtype)
    : parameters_(parameters),
      layout_(layout),
      ties_(ties),
      queue_(queue),
      zero_(zero),
      dtype_(stat_dtype(dtype)),
      contributions_(parameters),
      states_(layout.ranges().size()),
      all_summed_(backend),
      step_ended_(backend) {
  std::array<std::vector<GradRange>, kReduceGroups> ranges;
  for (const ShardRange& range : layout.ranges()) {
    ranges[number_of(range.group.reduce)].push_back(
        {range.group.begin, range.group.end, range.shard});
    DSTRAIN_CHECK(
        range.tie == Tie::none || (ties && ties->size() == 2),
        "'" + range.parameters.front()->spec.name + "' is tied, but no other stage is named");
  }
  for (size_t g = 0; g < kReduceGroups; ++g)
    if (!ranges[g].empty())
      reducers_[g] = make_reducer(static_cast<ReduceGroup>(g), parameters, std::move(ranges[g]));
  if (zero.shards_gradients())
    for (size_t i = 0; i < layout.slots().size(); ++i) slots_.emplace_back(backend);
}

void ShardGrads::make_memory(const OwnerVisitor& visit) {
  const bool sharded = zero_.shards_gradients();
  const int64_t elements = sharded ? layout_.shard_elements() : layout_.whole_elements();
  visit("gradients", MemoryKind::device,
        [&](Arena& a) { grads_ = a.make(dtype_, {elements}, "gradients"); });
  if (sharded)
    visit("gradients of blocks in flight", MemoryKind::device, [&](Arena& a) {
      for (size_t i = 0; i < slots_.size(); ++i)
        slots_[i].data = a.make(dtype_, {layout_.slots()[i]}, "gradients of a block");
    });
  for (const ShardRange& range : layout_.ranges())
    for (Parameter* p : range.parameters)
      p->grad = sharded ? Tensor() : parameter_view(contributions_of(range), range, *p);
  for (const auto& reducer : reducers_)
    if (reducer) reducer->make_memory(visit);
}

void ShardGrads::clear(DistStream dist) {
  dist.ops.fill(dist.stream, grads_, 0.0);
  for (const Slot& slot : slots_) dist.ops.fill(dist.stream, slot.data, 0.0);
  for (const auto& reducer : reducers_)
    if (reducer) reducer->clear(dist);
}

Tensor ShardGrads::contributions_of(const ShardRange& range) const {
  if (!zero_.shards_gradients())
    return grads_.rows(range.whole_at, range.whole_at + range.padded());
  const ShardBlock& block = layout_.blocks()[layout_.block_index(range.group.block)];
  return range_in_block(slots_[block.slot].data, range);
}

Tensor ShardGrads::shard(const ShardRange& range) const {
  const int64_t at =
      zero_.shards_gradients() ? range.shard_at : range.whole_at + range.ranks.rank * range.shard;
  return grads_.rows(at, at + range.shard);
}

Tensor ShardGrads::owned(const ShardRange& range) const {
  return shard(range).rows(0, range.owned().elements());
}

Tensor ShardGrads::whole(const ShardRange& range) const {
  DSTRAIN_CHECK(gathers(), "whole sums of gradients are on no rank");
  return grads_.rows(range.whole_at, range.whole_at + range.elements());
}

void ShardGrads::begin_step(int64_t step) {
  contributions_.begin();
  for (RangeState& state : states_) state = {};
  for (Slot& slot : slots_) slot.block = -1;
  caller_.reset();
  last_micro_batch_ = false;
  for (const auto& reducer : reducers_)
    if (reducer) reducer->begin_step(step);
}

GradTarget ShardGrads::grad(const Parameter& parameter) {
  const size_t index = layout_.range_index(parameter);
  const ShardRange& range = layout_.ranges()[index];
  RangeState& state = states_[index];
  if (zero_.shards_gradients())
    take_slot(layout_.blocks()[layout_.block_index(range.group.block)]);
  else
    DSTRAIN_CHECK(!state.summed, "a contribution to '" + parameter.spec.name +
                                     "' comes after its gradient was "
                                     "summed over ranks with the last micro-batch");
  state.contributed = true;
  return {parameter_view(contributions_of(range), range, parameter),
          contributions_.next(parameter)};
}

// Where weight gradients come long after the rest of a backward pass, blocks of one slot take turns
// within a micro-batch, and the sums of the last one are sent before it is done. All ranks do so
// alike.
void ShardGrads::take_slot(const ShardBlock& block) {
  DSTRAIN_CHECK(caller_.has_value(),
                "a contribution to a gradient comes before any call with a stream");
  Slot& slot = slots_[block.slot];
  if (slot.block != block.number) {
    if (slot.block >= 0) sum_block(*caller_, layout_.blocks()[layout_.block_index(slot.block)]);
    slot.block = block.number;
  }
  slot.summed.wait(*caller_, queue_.exposed(), CommKind::gradients);
}

void ShardGrads::grads_ready(DistStream dist, int block) {
  set_caller(dist);
  if (zero_.shards_gradients() || last_micro_batch_)
    sum_block(dist, layout_.blocks()[layout_.block_index(block)]);
}

// Sharded: the ranges with contributions. Whole: those not summed yet, which happens once a step.
void ShardGrads::sum_block(DistStream dist, const ShardBlock& block) {
  const bool sharded = zero_.shards_gradients();
  const DistStream comm = queue_after(dist);
  queue_.exposed().beside(CommKind::gradients, comm.stream, [&] {
    for (size_t i = block.first; i < block.last; ++i)
      if (sharded ? states_[i].contributed : !states_[i].summed) sum_range(comm, i);
  });
  if (!sharded) return;
  contributions_.begin(block.number);
  slots_[block.slot].summed.set(comm);
}

void ShardGrads::sum_range(DistStream comm, size_t index) {
  const ShardRange& range = layout_.ranges()[index];
  RangeState& state = states_[index];
  const bool first = !std::exchange(state.summed, true);
  state.contributed = false;
  if (range.shard == 0) return;
  const Tensor whole = contributions_of(range), sum = shard(range);
  zero_rest(comm, range, whole);
  GradReducer& reducer = reducer_of(range);
  if (first) {
    reducer.reduce_scatter(comm, range.reducer_range, whole, sum);
    if (gathers() && range.tie == Tie::none)
      reducer.all_gather(comm, range.reducer_range, sum, whole);
    return;
  }
  const Tensor part =
      whole.rows(range.ranks.rank * range.shard, (range.ranks.rank + 1) * range.shard);
  reducer.reduce_scatter(comm, range.reducer_range, whole, part);
  comm.ops.add(comm.stream, sum, part, sum);
}

// What no layer has written: gaps hold whatever the last user of the memory left there.
void ShardGrads::zero_rest(DistStream comm, const ShardRange& range, const Tensor& whole) const {
  for (const RangePart& gap : range.gaps)
    comm.ops.fill(comm.stream, whole.rows(gap.begin, gap.end), 0.0);
  for (const Parameter* p : range.parameters)
    if (!contributions_.any(*p)) comm.ops.fill(comm.stream, parameter_view(whole, range, *p), 0.0);
}

void ShardGrads::reduce(DistStream dist) {
  set_caller(dist);
  for (const ShardBlock& block : layout_.blocks()) sum_block(dist, block);
  const DistStream comm = queue_after(dist);
  queue_.exposed().beside(CommKind::gradients, comm.stream, [&] {
    for (size_t i = 0; i < states_.size(); ++i)
      if (!states_[i].summed) comm.ops.fill(comm.stream, shard(layout_.ranges()[i]), 0.0);
    sum_ties(comm);
  });
  all_summed_.set(comm);
  all_summed_.wait(dist, queue_.exposed(), CommKind::gradients);
}

// Both stages come to the same bits, so that both update alike.
void ShardGrads::sum_ties(DistStream comm) {
  for (const ShardRange& range : layout_.ranges()) {
    if (range.tie == Tie::none || range.shard == 0) continue;
    const Tensor sum = shard(range);
    if (!comm.dry) ties_->all_reduce_sum(comm.stream, sum);
    if (gathers())
      reducer_of(range).all_gather(comm, range.reducer_range, sum, contributions_of(range));
  }
}

void ShardGrads::end_step(DistStream dist, const StepScalars* scalars) {
  const DistStream comm = queue_after(dist);
  queue_.exposed().beside(CommKind::gradients, comm.stream, [&] {
    for (const auto& reducer : reducers_)
      if (reducer) reducer->end_step(comm, scalars);
  });
  step_ended_.set(comm);
}

// Sums that keep nothing for the next step need not wait.
void ShardGrads::hold_state(Event& copied) {
  residuals_are_copied_ = saved_residuals().empty() ? nullptr : &copied;
}

DistStream ShardGrads::queue_after(DistStream dist) {
  const DistStream comm = queue_.after(dist);
  if (residuals_are_copied_ && !dist.dry)
    std::exchange(residuals_are_copied_, nullptr)->wait_on(comm.stream);
  return comm;
}

std::vector<StateSlice> ShardGrads::saved_residuals() const {
  std::vector<StateSlice> all;
  for (const auto& reducer : reducers_)
    if (reducer) std::ranges::move(reducer->saved(), std::back_inserter(all));
  return all;
}

std::vector<StateSlice> ShardGrads::loaded_residuals(const SavedKinds& kinds) const {
  std::vector<StateSlice> all;
  for (const auto& reducer : reducers_)
    if (reducer) std::ranges::move(reducer->loaded(kinds), std::back_inserter(all));
  return all;
}

GradTraffic ShardGrads::traffic() const {
  GradTraffic sum;
  for (const auto& reducer : reducers_)
    if (reducer) sum += reducer->traffic();
  return sum;
}

}  // namespace dstrain
