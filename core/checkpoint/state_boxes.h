// The state of a run as boxes of global tensors, which is what checkpoints hold: a rank has flat
// runs of its parameters, moments and residuals (StateSlice), and a run covers a few boxes.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/checkpoint/manifest.h"
#include "core/checkpoint/store.h"
#include "core/dist/param_store.h"

namespace dstrain {

// Boxes in the order of the run's elements, so that their data follow each other without gaps from
// slice.data on: none for an empty run, 2 * dims - 1 at most, one for a whole parameter. The name
// is the slice's kind, a dot, and the parameter's name. Data stays where the slice has it, on the
// device or not. Boxes of bf16 parameters are f32, as a checkpoint holds them.
std::vector<StateTensor> state_boxes(const StateSlice& slice);

// The boxes of all slices, in order, to be saved. All bf16 parameters have their lower halves.
std::vector<StateTensor> state_tensors(std::span<const StateSlice> slices);

// The kinds of state that a checkpoint holds, by parameter. A parameter is what has a "param" tensor.
std::map<std::string, std::vector<std::string>> kinds_by_parameter(const Manifest& manifest);

}  // namespace dstrain
