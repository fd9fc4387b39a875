// Whether the ranks of a job were all given the same one. Each host reads a job file and data of
// its own, and mpirun takes other options for some ranks than for others. Ranks that differ would
// train what nobody has asked for, or wait for each other for ever.
#pragma once

#include <map>
#include <string>

#include "core/config/config.h"
#include "core/dist/communicator.h"

namespace dstrain {

// Collective calls. Every rank throws if one differs from the first; `machine` is where this one
// runs.

// ConfigError with the keys. run.threads and launch may differ: hosts do, and only the launcher
// follows launch.
void require_same_job(Communicator& world, const std::string& machine, const Config& config);

// DataError with the names. prints: contents by the name of a file or dataset in the job file.
void require_same_data(Communicator& world, const std::string& machine,
                       const std::map<std::string, std::string>& prints);

}  // namespace dstrain
