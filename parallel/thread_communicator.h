// Ranks as threads of one process: what `verify` and the tests run instead of processes. Calls are
// those of Communicator on host memory: when one returns, it has passed. Ranks that wait sleep, so
// more ranks than cores are fine.
#pragma once

#include <chrono>
#include <functional>

#include "core/dist/communicator.h"

namespace dstrain {

struct RankThreadOptions {
  // How long a rank waits in one call for the others before they count as failed.
  std::chrono::milliseconds timeout = std::chrono::minutes(10);
};

// Runs body(world) once on each of `ranks` threads, with a communicator over all of them, and
// returns when all bodies have returned. A body's communicators, those of split() included, end
// with it.
//
// If a body throws, or does not come to a call within the time-out, the calls of all other ranks
// throw PeerFailure, on every communicator. The first failure is thrown here: with its exit code
// and "rank 2: " before its text, or as it is where it is no std::exception. A body that hangs
// outside of a communicator keeps this function from returning: a thread cannot be ended from
// outside.
void run_rank_threads(int ranks, const std::function<void(Communicator& world)>& body,
                      const RankThreadOptions& options = {});

}  // namespace dstrain
