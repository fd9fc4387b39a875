#include "test/support/mpi_ranks.h"

namespace dstrain::test {

MpiSession& mpi_session(const MpiOptions& options) {
  static MpiSession session(options);
  return session;
}

void run_mpi_rank(const RankBody& body, const MpiOptions& options) {
  mpi_session(options).run([&](Communicator& world) { run_rank(world, body); });
}

}  // namespace dstrain::test
