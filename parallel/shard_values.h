// The values of shared parameters: whole on every rank and gathered after each update (ZeRO 0, 1
// and 2), or sharded and gathered block by block when layers ask for them (ZeRO 3).
#pragma once

#include <span>
#include <vector>

#include "core/dist/communicator.h"
#include "parallel/comm_queue.h"
#include "parallel/shard_layout.h"

namespace dstrain {

// By ReduceGroup: the ranks that sum its gradients. They outlive their users.
using GroupComms = std::array<Communicator*, kReduceGroups>;

// Calls are those of ParamStore. Communication runs on the queue; acquire_finish makes the caller's
// stream wait for the block. Thread-compatible.
class ShardValues {
 public:
  ShardValues(Backend& backend, const ShardLayout& layout, const GroupComms& comms,
              CommQueue& queue, const ZeroOptions& zero, DType dtype);

  void make_memory(const OwnerVisitor& visit);
  void clear(DistStream dist);

  // A prefetch: nothing happens where the block's slot is in use. Other calls with sharded values
  // need the slot, whose last block must be released.
  void acquire_start(DistStream dist, int block);
  void acquire_finish(DistStream dist, int block);
  void release(int block);
  // The block's shards have new values.
  void publish(DistStream dist, int block);

  // The whole range, absent where it is sharded; and elements owned() of it.
  Tensor whole(const ShardRange& range) const;
  Tensor owned(const ShardRange& range) const;

 private:
  struct Slot {
    Tensor data;
    int block = -1;  // whose values it holds, or gets
  };
  struct BlockState {
    int acquired = 0;
    CommPoint ready;
  };

  // This rank's shard with its padding.
  Tensor shard(const ShardRange& range) const;
  std::span<const ShardRange> ranges_of(const ShardBlock& block) const;
  void gather(DistStream comm, const ShardBlock& block, const Tensor& whole_ranges);
  void bind(const ShardBlock& block, const Tensor& whole_ranges) const;
  void unbind(const ShardBlock& block) const;

  const ShardLayout& layout_;
  const GroupComms comms_;
  CommQueue& queue_;
  const ZeroOptions zero_;
  const DType dtype_;
  Tensor values_;  // whole ranges, or shards
  std::vector<Slot> slots_;
  std::vector<BlockState> blocks_;  // in the order of layout_.blocks()
};

}  // namespace dstrain
