#include "test/support/mpi_ranks.h"

#include <cstdlib>

#include "apps/rank_environment.h"

namespace dstrain::test {

MpiSession& mpi_session(const MpiOptions& options) {
  static MpiSession session([&] {
    MpiOptions all = options;
    const auto launched = rank_environment([](const char* name) { return std::getenv(name); });
    all.expected_ranks = launched ? static_cast<int>(launched->size) : 1;
    return all;
  }());
  return session;
}

void run_mpi_rank(const RankBody& body, const MpiOptions& options) {
  mpi_session(options).run([&](Communicator& world) { run_rank(world, body); });
}

}  // namespace dstrain::test
