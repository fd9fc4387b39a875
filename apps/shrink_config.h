// A job of a second with the architecture of a large one, so that layouts can be tried on it. Every
// choice that takes another path through the code stays: attention, expert groups, shared experts,
// dense blocks, prediction modules, tied tables, losses, schedule, ZeRO, recomputation. Only sizes
// change, and sizes that ranks share still divide by what the large ones divide by. Pure functions.
#pragma once

#include <cstdint>

#include "core/config/config.h"
#include "core/config/layout.h"

namespace dstrain {

// The layout on at most `ranks` ranks (at least 2): every axis in use stays in use while there is
// room, in the order pipeline, tensor, context, data; then axes grow again towards what they were.
// Experts stay on a part of a stage if they were.
MeshShape shrink_shape(const MeshShape& shape, int64_t ranks);

// The job for layouts of at most `ranks` ranks, `own` (a result of shrink_shape) among them, with
// at least three micro-batches a step in each. A vocabulary that is not known yet becomes an odd
// one. Precision becomes fp32, compression none, gradients are clipped where they were. Initial
// weights are random; their size and the learning rate are such that gradients are well above
// rounding and a few steps change the losses.
Config shrink_config(const Config& config, const MeshShape& own, int64_t ranks);

}  // namespace dstrain
