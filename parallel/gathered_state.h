// The state of a run as whole tensors, brought together from the ranks that hold parts of them.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/dist/communicator.h"
#include "core/engine/train_engine.h"

namespace dstrain {

// A tensor of the whole model, and how many ranks brought each of its elements.
struct GatheredTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
  std::vector<int32_t> brought;
};
using GatheredState =
    std::map<std::string, GatheredTensor>;  // by kind and parameter: "param.model.norm.weight"

// Adds slices of one rank. Not thread-safe.
void gather_state(TrainEngine& engine, std::span<const StateSlice> slices, GatheredState& state);
// Gives every rank what all ranks have; a collective call on host memory. Each element must lie on
// one rank.
void share_state(Communicator& ranks, Stream& stream, GatheredState& state);
// Throws unless each element was brought once.
void require_whole(const GatheredState& state);
// The first slice whose elements are not those of the state, bit for bit; "" if there is none.
// Slices of other kinds than `kind` do not count; copies in bf16 are those of the state, rounded.
std::string copy_difference(TrainEngine& engine, std::span<const StateSlice> slices,
                            const std::string& kind, const GatheredState& state);
// The first tensor of `a` that `b` does not have with the same bits; "" if there is none.
std::string bit_difference(const GatheredState& a, const GatheredState& b);

}  // namespace dstrain
