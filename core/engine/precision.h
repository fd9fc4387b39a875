// What the job file's `precision` means to an engine.
#pragma once

#include "core/backend/backend.h"
#include "core/config/config.h"
#include "core/engine/train_engine.h"

namespace dstrain {

// Sets the types of values and moments: compute: auto is f32 on a CPU and bf16 elsewhere. TF32 is
// f32 here: how products are made is the back end's affair. ConfigError if a CPU is asked for what
// it cannot do.
void set_precision(const PrecisionConfig& precision, const Backend& backend,
                   EngineOptions& options);

}  // namespace dstrain
