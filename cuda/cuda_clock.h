// Times on a CUDA stream, by events.
#pragma once

#include <memory>

#include "core/backend/timed_ops.h"

namespace dstrain {

std::unique_ptr<OpClock> make_cuda_clock();

}  // namespace dstrain
