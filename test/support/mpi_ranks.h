// For test/**/x_mpi_test.cpp, which are built into rank_tests and run under mpirun: one CTest entry
// for each case and each of its tags [ranks1], [ranks2], [ranks3], [ranks4]. All ranks run the same
// case.
#pragma once

#include "parallel/mpi_session.h"
#include "test/support/rank_threads.h"

namespace dstrain::test {

// MPI, initialised by the first call. The options are those of the first call.
MpiSession& mpi_session(const MpiOptions& options);

// Runs the body as this process's rank. Here Catch2's assertions may be used: a rank that fails one
// wakes the others.
void run_mpi_rank(const RankBody& body,
                  const MpiOptions& options = {.timeout = std::chrono::seconds(20)});

}  // namespace dstrain::test
