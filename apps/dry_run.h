// --dry-run: everything that a run checks before its first step, and what it would use.
#pragma once

#include <optional>
#include <vector>

#include "apps/commands.h"
#include "apps/rank_environment.h"
#include "core/config/availability.h"

namespace dstrain {

// Prints the configuration, the start-up table and what this build cannot do. What a run would be
// refused for here, such as missing files or too little memory, is a warning: a plan may be for
// another machine. Allocates and writes nothing. ConfigError for a configuration that holds
// nowhere. Where mpirun or srun has started ranks, the plan is for those, and the first prints it.
int dry_run(const LoadedConfig& loaded, const TrainOptions& options,
            const std::vector<Unavailable>& missing, bool color,
            const std::optional<RankEnvironment>& launched);

}  // namespace dstrain
