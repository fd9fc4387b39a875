// Where the parameters of a model part lie when several ranks share them (ZeRO), in elements.
//
// Each ParameterGroup is a range, cut into one shard for each rank that sums its gradients. A shard
// is a multiple of 64 elements, so a range is padded at its end: whole ranges have memory for shard
// * ranks elements, and lie one after another in arrays of their own, with offsets other than
// Parameter::offset. Ranges of a block are consecutive, so that a block is one run of such an
// array.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/dist/param_store.h"
#include "core/dist/parameter.h"

namespace dstrain {

// What ranks share: 0 nothing, 1 moments and the update, 2 gradients as well, 3 values as well.
struct ZeroOptions {
  int stage = 1;
  // Stages 2 and 3: keep whole gradients, which are summed once per step.
  bool keep_full_grads = false;
  // The block of the final norm and the head. It is in use together with other blocks, as is block
  // 0, so both have slots of their own; all other blocks take turns with two slots by parity. -1:
  // not here.
  int head_block = -1;

  bool shards_values() const { return stage == 3; }
  bool shards_gradients() const { return stage >= 2 && !keep_full_grads; }
  bool shards_moments() const { return stage >= 1; }
};

inline constexpr size_t kReduceGroups = 3;
inline size_t number_of(ReduceGroup group) {
  return static_cast<size_t>(group);
}

// By ReduceGroup: how many ranks sum gradients, and which of them this one is.
using GroupPlaces = std::array<AxisPlace, kReduceGroups>;

// Elements [begin, end) of a range, counted from its start.
struct RangePart {
  int64_t begin = 0, end = 0;
  int64_t elements() const { return end - begin; }
};

// A part of a range that belongs to one parameter.
struct ParameterPart {
  const Parameter* parameter = nullptr;
  int64_t begin = 0, end = 0;  // elements of the parameter
  int64_t at = 0;              // of the first, in the range
};

struct ShardRange {
  ParameterGroup group;  // `begin` and `end` count elements of the ParameterSet's flat range
  AxisPlace ranks;
  Tie tie = Tie::none;                 // of all its parameters
  int64_t shard = 0;                   // elements per rank
  int64_t whole_at = 0;                // in an array of whole ranges
  int64_t shard_at = 0;                // in an array of this rank's shards
  int64_t block_at = 0;                // of the whole range in its block
  int reducer_range = 0;               // its number among the ranges of its ReduceGroup
  std::vector<Parameter*> parameters;  // by offset
  std::vector<RangePart> gaps;         // elements of no parameter, padding included

  int64_t elements() const { return group.end - group.begin; }
  int64_t padded() const { return shard * ranks.size; }
  RangePart all() const { return {0, elements()}; }  // without padding
  RangePart owned() const;  // this rank's shard, without padding; may be empty
  std::vector<ParameterPart> parameters_in(RangePart part) const;
};

struct ShardBlock {
  int number = 0;              // ParameterSpec::block
  size_t first = 0, last = 0;  // ranges
  int64_t elements = 0;        // of its whole ranges
  size_t slot = 0;
};

class ShardLayout {
 public:
  static constexpr int64_t kAlignment = 64;

  // `parameters` has its layout and outlives this.
  ShardLayout(ParameterSet& parameters, const GroupPlaces& places, int head_block);

  const std::vector<ShardRange>& ranges() const { return ranges_; }
  const std::vector<ShardBlock>& blocks() const { return blocks_; }
  size_t block_index(int number) const;          // there must be one
  size_t range_index(const Parameter& p) const;  // of a trainable parameter
  int64_t whole_elements() const { return whole_elements_; }
  int64_t shard_elements() const { return shard_elements_; }
  // Elements of each slot for whole blocks; 0 where no block here needs it.
  const std::vector<int64_t>& slots() const { return slots_; }

 private:
  void add_range(const ParameterGroup& group, const GroupPlaces& places);
  void add_parameters(ParameterSet& parameters);

  std::vector<ShardRange> ranges_;
  std::vector<ShardBlock> blocks_;  // by number
  std::vector<int64_t> slots_;
  int64_t whole_elements_ = 0, shard_elements_ = 0;
};

// The whole range in `block_data`, the elements of its block's whole ranges.
inline Tensor range_in_block(const Tensor& block_data, const ShardRange& range) {
  return block_data.rows(range.block_at, range.block_at + range.padded());
}
// Where the parameter lies in `range_data`, the elements of its whole range.
Tensor parameter_view(const Tensor& range_data, const ShardRange& range,
                      const Parameter& parameter);

// What a rank's store takes, in bytes. Each array is rounded up to Arena::kAlignment.
struct ShardBytes {
  int64_t values = 0;          // whole or sharded, and the buffers
  int64_t gather_slots = 0;    // whole values of the blocks in use
  int64_t gradients = 0;       // whole or sharded sums
  int64_t gradient_slots = 0;  // whole gradients of the blocks in flight
  int64_t moments = 0;
  int64_t low = 0;  // lower halves of bf16 values
  int64_t total() const {
    return values + gather_slots + gradients + gradient_slots + moments + low;
  }
};
ShardBytes bytes_per_rank(const ShardLayout& layout, int64_t buffer_elements,
                          const ZeroOptions& zero, const ParamStoreOptions& options);
// "values 1.20 GiB, gathered blocks 512 B, ...": parts that take nothing are left out.
std::string describe(const ShardBytes& bytes);

}  // namespace dstrain
