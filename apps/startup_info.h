// The start-up table's facts, as far as a configuration alone tells them.
#pragma once

#include "core/config/config.h"
#include "core/engine/train_engine.h"
#include "core/metrics/run_info.h"

namespace dstrain {

// engine may be null (--dry-run of something this build cannot run): memory is then unknown.
StartupInfo startup_info_of(const Config& config, TrainEngine* engine);

}  // namespace dstrain
