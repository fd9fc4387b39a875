// Ranks for tests: one body run by several ranks at once, each with a CPU back end of one thread.
//
//   run_ranks(4, [&](RankContext& rank) {
//     ...
//     rank_check(sum == 10, "the sum over ranks");
//   });
//
// Catch2's assertions are not thread-safe: a body throws, through rank_check or otherwise, and
// run_ranks throws the first failure, with the rank in its text, in the test's own thread.
#pragma once

#include <chrono>
#include <functional>
#include <string>

#include "core/backend/backend.h"
#include "core/dist/communicator.h"

namespace dstrain::test {

struct RankContext {
  Communicator& world;
  Backend& backend;
  Stream& stream;
};
using RankBody = std::function<void(RankContext&)>;

// Threads of this process (parallel/thread_communicator.h).
void run_ranks(int ranks, const RankBody& body,
               std::chrono::milliseconds timeout = std::chrono::seconds(20));

// The body of one rank, whatever made the communicator.
void run_rank(Communicator& world, const RankBody& body);

void rank_check(bool ok, const std::string& what);

}  // namespace dstrain::test
