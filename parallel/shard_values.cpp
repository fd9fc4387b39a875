#include "parallel/shard_values.h"

namespace dstrain {

ShardValues::ShardValues(Backend& backend, const ShardLayout& layout, const GroupComms& comms,
                         CommQueue& queue, const ZeroOptions& zero, DType dtype)
    : layout_(layout), comms_(comms), queue_(queue), zero_(zero), dtype_(dtype) {
  for (size_t i = 0; i < layout.blocks().size(); ++i) blocks_.push_back({0, CommPoint(backend)});
}

void ShardValues::make_memory(const OwnerVisitor& visit) {
  const bool sharded = zero_.shards_values();
  const int64_t elements = sharded ? layout_.shard_elements() : layout_.whole_elements();
  visit("parameters", MemoryKind::device,
        [&](Arena& a) { values_ = a.make(dtype_, {elements}, "parameters"); });
  slots_.assign(sharded ? layout_.slots().size() : 0, {});
  for (BlockState& state : blocks_) state.acquired = 0;
  if (!sharded) {
    for (const ShardBlock& block : layout_.blocks())
      bind(block, values_.rows(layout_.ranges()[block.first].whole_at, values_.numel()));
    return;
  }
  visit("gathered parameters", MemoryKind::device, [&](Arena& a) {
    for (size_t i = 0; i < slots_.size(); ++i)
      slots_[i].data = a.make(dtype_, {layout_.slots()[i]}, "values of a block");
  });
  for (const ShardBlock& block : layout_.blocks()) unbind(block);
}

void ShardValues::clear(DistStream dist) {
  dist.ops.fill(dist.stream, values_, 0.0);
  for (Slot& slot : slots_) slot.block = -1;
}

std::span<const ShardRange> ShardValues::ranges_of(const ShardBlock& block) const {
  return std::span(layout_.ranges()).subspan(block.first, block.last - block.first);
}

Tensor ShardValues::whole(const ShardRange& range) const {
  if (zero_.shards_values()) return {};
  return values_.rows(range.whole_at, range.whole_at + range.padded());
}

Tensor ShardValues::shard(const ShardRange& range) const {
  const int64_t at =
      zero_.shards_values() ? range.shard_at : range.whole_at + range.ranks.rank * range.shard;
  return values_.rows(at, at + range.shard);
}

Tensor ShardValues::owned(const ShardRange& range) const {
  return shard(range).rows(0, range.owned().elements());
}

void ShardValues::gather(DistStream comm, const ShardBlock& block, const Tensor& whole_ranges) {
  if (comm.dry) return;
  queue_.exposed().beside(CommKind::parameters, comm.stream, [&] {
    for (const ShardRange& range : ranges_of(block)) {
      if (range.shard == 0) continue;
      comms_[number_of(range.group.reduce)]->all_gather(comm.stream, shard(range),
                                                        range_in_block(whole_ranges, range));
    }
  });
}

void ShardValues::bind(const ShardBlock& block, const Tensor& whole_ranges) const {
  for (const ShardRange& range : ranges_of(block))
    for (Parameter* p : range.parameters)
      p->value = parameter_view(range_in_block(whole_ranges, range), range, *p);
}

void ShardValues::unbind(const ShardBlock& block) const {
  for (const ShardRange& range : ranges_of(block))
    for (Parameter* p : range.parameters) p->value = Tensor();
}

// A slot keeps its block after the release, so that the last block of a forward pass is there when
// the backward pass begins.
void ShardValues::acquire_start(DistStream dist, int number) {
  if (!zero_.shards_values()) return;
  const size_t index = layout_.block_index(number);
  const ShardBlock& block = layout_.blocks()[index];
  Slot& slot = slots_[block.slot];
  if (slot.block == number) return;
  if (slot.block >= 0 && blocks_[layout_.block_index(slot.block)].acquired > 0) return;
  slot.block = number;
  // It runs after what the caller has queued, which may read the slot's last block.
  const DistStream comm = queue_.after(dist);
  gather(comm, block, slot.data);
  blocks_[index].ready.set(comm);
}

void ShardValues::acquire_finish(DistStream dist, int number) {
  acquire_start(dist, number);
  const size_t index = layout_.block_index(number);
  const ShardBlock& block = layout_.blocks()[index];
  BlockState& state = blocks_[index];
  if (zero_.shards_values()) {
    const Slot& slot = slots_[block.slot];
    DSTRAIN_CHECK(slot.block == number, "block " + std::to_string(number) +
                                            " is acquired while block " +
                                            std::to_string(slot.block) + " is in its place");
    if (state.acquired == 0) bind(block, slot.data);
  }
  ++state.acquired;
  state.ready.wait(dist, queue_.exposed(), CommKind::parameters);
}

void ShardValues::release(int number) {
  const size_t index = layout_.block_index(number);
  BlockState& state = blocks_[index];
  DSTRAIN_CHECK(state.acquired > 0,
                "block " + std::to_string(number) + " is released but not acquired");
  if (--state.acquired == 0 && zero_.shards_values()) unbind(layout_.blocks()[index]);
}

void ShardValues::publish(DistStream dist, int number) {
  const size_t index = layout_.block_index(number);
  const ShardBlock& block = layout_.blocks()[index];
  if (zero_.shards_values() && slots_[block.slot].block == number) slots_[block.slot].block = -1;
  if (zero_.stage != 1 && zero_.stage != 2) return;
  const DistStream comm = queue_.after(dist);
  gather(comm, block, values_.rows(layout_.ranges()[block.first].whole_at, values_.numel()));
  blocks_[index].ready.set(comm);
}

}  // namespace dstrain
