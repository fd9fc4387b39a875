// MPI processes as ranks: every call against the serial result, with whole messages and with cut
// ones, and what happens when a rank fails or does not come.
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "test/support/catch.h"
#include "test/support/communicator_check.h"
#include "test/support/mpi_ranks.h"

namespace dstrain::test {
namespace {

using std::chrono::milliseconds;

void check_all(RankContext& rank) {
  check_reductions(rank);
  check_exchanges(rank);
  check_messages(rank);
  check_splits(rank);
  check_bytes_sent(rank);
}

TEST_CASE("mpi communicator: every call gives the serial result, bit for bit",
          "[ranks1][ranks2][ranks3][ranks4]") {
  run_mpi_rank(check_all);
}

}  // namespace
}  // namespace dstrain::test
