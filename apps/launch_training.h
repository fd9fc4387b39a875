// The launcher for a training job: from a configuration to the ranks that train it.
#pragma once

#include <string>
#include <vector>

#include "apps/launcher.h"
#include "apps/rank_environment.h"
#include "core/config/config.h"

namespace dstrain {

// How the launcher's own standard error looks; ranks cannot see that, since theirs is a pipe.
struct LauncherConsole {
  bool color = false, live = false;
};

// Starts the ranks and returns the exit code of the job. The configuration is valid. words: the
// options of this program's command line; hosts: see ranks_to_start().
int launch_training(const Config& config, const std::vector<HostRanks>& hosts,
                    const std::vector<std::string>& words, const LauncherConsole& console,
                    const Variables& variables);

}  // namespace dstrain
