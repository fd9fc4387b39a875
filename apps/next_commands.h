// What one types after a run.
#pragma once

#include <vector>

#include "core/config/config.h"
#include "core/metrics/run_info.h"

namespace dstrain {

// Of a finished run: what its model can be used for; of a stopped one: how it goes on. The commands
// are quoted for a shell.
std::vector<NextCommand> next_commands(const Config& config, bool is_finished);

}  // namespace dstrain
