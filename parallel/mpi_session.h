// This process as a rank of an MPI job.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/dist/communicator.h"

namespace dstrain {

struct MpiOptions {
  // How long a rank waits in one call for the others before they count as failed.
  std::chrono::milliseconds timeout = std::chrono::minutes(10);
  // The number of ranks that the launcher promised; 0 takes what MPI says.
  int expected_ranks = 0;
  // What sums receive from other ranks lies in one buffer of this size per process; longer tensors
  // are summed in pieces. It is allocated as it is needed and then kept.
  int64_t staging_bytes = 32 << 20;
  // Longer messages are cut: MPI counts in int.
  int64_t max_message_bytes = 1 << 30;
};

// Initialises MPI; one per process, and no second one after it. Thread-compatible: calls of the
// session and of its communicators may come from any thread, one at a time (MPI_THREAD_SERIALIZED,
// which costs no more than FUNNELED and lets a rank's body run on a thread other than the one that
// initialised).
//
// Signal handlers are what they were: those that MPI installs are taken back, because no handler
// may run on threads that compute. MPI's own threads inherit the signal mask, so block signals
// before.
//
// Throws RuntimeFailure if MPI offers less than that, or other than the expected number of ranks.
class MpiSession {
 public:
  explicit MpiSession(const MpiOptions& options = {});
  // Finalises MPI, unless a rank failed: the others may then never come to it. A process that ends
  // without finalising makes mpirun end the job, with this process's exit code.
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  // All ranks of the job. It and what is split from it must be gone before the session.
  Communicator& world();

  // Runs body(world). If it throws, the other ranks hear of it, so that their calls throw
  // PeerFailure ("rank 2 failed: ..."), and the exception goes on.
  void run(const std::function<void(Communicator& world)>& body);

  // Waits for all ranks; for the end of a run, and for whoever knows that all ranks come in spite
  // of a failure. No communicator may be used any more. The destructor then does nothing.
  void finalize();

  // Ends all ranks of the job at once; mpirun passes the exit code on.
  [[noreturn]] void abort(int exit_code);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// "4.1.4", of the Open MPI that was loaded; before or after it is initialised.
std::string mpi_library_version();

// For a process that is about to exit because of a failure, its session gone: ends the other ranks
// at once, which mpirun by itself does a second later, and passes the exit code on. Returns where
// MPI is not in use.
void abort_unfinished_job(int exit_code);

}  // namespace dstrain
