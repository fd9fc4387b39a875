// Times on a CUDA stream, by events.
#pragma once

#include <memory>

#include "core/backend/op_clock.h"

namespace dstrain {

std::unique_ptr<OpClock> make_cuda_clock();

}  // namespace dstrain
