#include "parallel/shard_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "core/base/format_units.h"

namespace dstrain {
namespace {

enum Slot : size_t { kEmbedding, kHead, kEven, kOdd, kSlots };

int64_t round_up(int64_t value, int64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

ReduceGroup reduce_group(const Parameter& p) {
  if (p.is_expert()) return ReduceGroup::expert;
  return p.is_tensor_cut() ? ReduceGroup::tensor_cut : ReduceGroup::replicated;
}

size_t slot_of(int block, int head_block) {
  if (block == 0) return kEmbedding;
  if (block == head_block) return kHead;
  return block % 2 == 0 ? kEven : kOdd;
}

int64_t array_bytes(int64_t elements, DType dtype) {
  return round_up(elements * dtype_bytes(dtype), Arena::kAlignment);
}

int64_t slot_bytes(const std::vector<int64_t>& slots, DType dtype) {
  int64_t bytes = 0;
  for (const int64_t elements : slots) bytes += array_bytes(elements, dtype);
  return bytes;
}

}  // namespace

RangePart ShardRange::owned() const {
  return {std::min(elements(), ranks.rank * shard), std::min(elements(), (ranks.rank + 1) * shard)};
}

std::vector<ParameterPart> ShardRange::parameters_in(RangePart part) const {
  std::vector<ParameterPart> out;
  for (const Parameter* p : parameters) {
    const int64_t at = p->offset - group.begin;
    const int64_t from = std::max(part.begin, at), to = std::min(part.end, at + p->numel());
    if (from < to) out.push_back({p, from - at, to - at, from});
  }
  return out;
}

ShardLayout::ShardLayout(ParameterSet& parameters, const GroupPlaces& places, int head_block)
    : slots_(kSlots) {
  for (const ParameterGroup& group : parameters.groups()) add_range(group, places);
  add_parameters(parameters);
  for (ShardBlock& block : blocks_) {
    block.slot = slot_of(block.number, head_block);
    slots_[block.slot] = std::max(slots_[block.slot], block.elements);
  }
}

void ShardLayout::add_range(const ParameterGroup& group, const GroupPlaces& places) {
  if (blocks_.empty() || blocks_.back().number != group.block)
    blocks_.push_back({group.block, ranges_.size(), ranges_.size(), 0, 0});
  ShardBlock& block = blocks_.back();
  ShardRange range;
  range.group = group;
  range.ranks = places[number_of(group.reduce)];
  range.shard = round_up((range.elements() + range.ranks.size - 1) / range.ranks.size, kAlignment);
  range.whole_at = whole_elements_;
  range.shard_at = shard_elements_;
  range.block_at = block.elements;
  range.reducer_range =
      static_cast<int>(std::count_if(ranges_.begin(), ranges_.end(), [&](const ShardRange& other) {
        return other.group.reduce == group.reduce;
      }));
  whole_elements_ += range.padded();
  shard_elements_ += range.shard;
  block.elements += range.padded();
  ranges_.push_back(std::move(range));
  block.last = ranges_.size();
}

void ShardLayout::add_parameters(ParameterSet& parameters) {
  for (Parameter& p : parameters.all())
    if (p.spec.trainable) ranges_[range_index(p)].parameters.push_back(&p);
  for (ShardRange& range : ranges_) {
    std::sort(range.parameters.begin(), range.parameters.end(),
              [](const Parameter* a, const Parameter* b) { return a->offset < b->offset; });
    range.tie = range.parameters.front()->spec.tie;
    int64_t end = 0;
    for (const Parameter* p : range.parameters) {
      DSTRAIN_CHECK(p->spec.tie == range.tie,
                    "'" + p->spec.name + "' shares its range with a tied parameter");
      const int64_t at = p->offset - range.group.begin;
      if (end < at) range.gaps.push_back({end, at});
      end = at + p->numel();
    }
    if (end < range.padded()) range.gaps.push_back({end, range.padded()});
  }
}

size_t ShardLayout::block_index(int number) const {
  const auto at =
      std::partition_point(blocks_.begin(), blocks_.end(),
                           [&](const ShardBlock& block) { return block.number < number; });
  DSTRAIN_CHECK(at != blocks_.end() && at->number == number,
                "no parameters of block " + std::to_string(number) + " are here");
  return static_cast<size_t>(at - blocks_.begin());
}

// Not by offset: an empty slice of a parameter can lie at the end of its range.
size_t ShardLayout::range_index(const Parameter& p) const {
  const ShardBlock& block = blocks_[block_index(p.spec.block)];
  for (size_t i = block.first; i < block.last; ++i)
    if (ranges_[i].group.reduce == reduce_group(p) &&
        ranges_[i].group.weight_decay == p.spec.weight_decay)
      return i;
  check_failed("range", __FILE__, __LINE__, "'" + p.spec.name + "' has no range");
}

Tensor parameter_view(const Tensor& range_data, const ShardRange& range,
                      const Parameter& parameter) {
  char* at = static_cast<char*>(range_data.raw());
  at += (parameter.offset - range.group.begin) * dtype_bytes(range_data.dtype());
  return Tensor(at, range_data.dtype(), parameter.local_shape.data(),
                static_cast<int>(parameter.local_shape.size()));
}

ShardBytes bytes_per_rank(const ShardLayout& layout, int64_t buffer_elements,
                          const ZeroOptions& zero, const ParamStoreOptions& options) {
  const DType value = options.dtype, stat = stat_dtype(options.dtype);
  const int64_t whole = layout.whole_elements(), shards = layout.shard_elements();
  ShardBytes bytes;
  bytes.values = array_bytes(zero.shards_values() ? shards : whole, value) +
                 array_bytes(buffer_elements, stat);
  if (zero.shards_values()) bytes.gather_slots = slot_bytes(layout.slots(), value);
  if (!options.training) return bytes;
  bytes.gradients = array_bytes(zero.shards_gradients() ? shards : whole, stat);
  if (zero.shards_gradients()) bytes.gradient_slots = slot_bytes(layout.slots(), stat);
  const int64_t updated = zero.shards_moments() ? shards : whole;
  bytes.moments = 2 * array_bytes(updated, options.moment_dtype());
  if (options.has_low()) bytes.low = array_bytes(updated, DType::u16);
  return bytes;
}

std::string describe(const ShardBytes& bytes) {
  std::string text;
  const auto add = [&](const char* name, int64_t part) {
    if (part > 0)
      text += fmt::format("{}{} {}", text.empty() ? "" : ", ", name, format_bytes(part));
  };
  add("values", bytes.values);
  add("gathered blocks", bytes.gather_slots);
  add("gradients", bytes.gradients);
  add("gradients of blocks in flight", bytes.gradient_slots);
  add("moments", bytes.moments);
  add("lower halves of values", bytes.low);
  return text;
}

}  // namespace dstrain
