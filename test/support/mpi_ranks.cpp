#include "test/support/mpi_ranks.h"

#include <cstdlib>

namespace dstrain::test {

MpiSession& mpi_session(const MpiOptions& options) {
  static MpiSession session([&] {
    MpiOptions all = options;
    all.expected_ranks = mpi_launch([](const char* name) { return std::getenv(name); }).ranks;
    return all;
  }());
  return session;
}

void run_mpi_rank(const RankBody& body, const MpiOptions& options) {
  mpi_session(options).run([&](Communicator& world) { run_rank(world, body); });
}

}  // namespace dstrain::test
