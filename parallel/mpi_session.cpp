#include "parallel/mpi_session.h"

#include <fmt/format.h>
#include <mpi.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

#include "parallel/mpi_communicator.h"
#include "parallel/mpi_job.h"

namespace dstrain {
namespace {

// Takes back the signal handlers that are installed during its life. What is set to be ignored
// stays so.
class KeepSignalHandlers {
 public:
  KeepSignalHandlers() {
    for (int signal = 1; signal < NSIG; ++signal) known(signal) = read(signal, before(signal));
  }
  ~KeepSignalHandlers() {
    struct sigaction now;
    for (int signal = 1; signal < NSIG; ++signal) {
      if (!known(signal) || !read(signal, now)) continue;
      const bool ignored = now.sa_handler == SIG_IGN;
      if (!ignored && now.sa_handler != before(signal).sa_handler)
        sigaction(signal, &before(signal), nullptr);
    }
  }
  KeepSignalHandlers(const KeepSignalHandlers&) = delete;
  KeepSignalHandlers& operator=(const KeepSignalHandlers&) = delete;

 private:
  static bool read(int signal, struct sigaction& action) {
    return sigaction(signal, nullptr, &action) == 0;
  }
  bool& known(int signal) { return known_[static_cast<size_t>(signal)]; }
  struct sigaction& before(int signal) {
    return before_[static_cast<size_t>(signal)];
  }

  std::array<bool, NSIG> known_{};
  std::array<struct sigaction, NSIG> before_{};
};

// What is refused is refused on all ranks, so that MPI can be finalised.
void initialise(int expected_ranks) {
  int provided = 0, ranks = 0;
  {
    const KeepSignalHandlers keep;
    check_mpi(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided),
              "MPI_Init_thread");
  }
  check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &ranks), "MPI_Comm_size");
  if (provided < MPI_THREAD_SERIALIZED) {
    MPI_Finalize();
    throw RuntimeFailure(
        "this MPI library does not let threads take turns in calling it (MPI_THREAD_SERIALIZED); "
        "use one built with threads");
  }
  if (expected_ranks > 0 && ranks != expected_ranks) {
    MPI_Finalize();
    throw RuntimeFailure(fmt::format(
        "{} ranks were started but MPI counts {}: the launcher and the MPI library of this program "
        "do not know each other; under Slurm use srun --mpi=pmix, elsewhere the mpirun of this "
        "library",
        expected_ranks, ranks));
  }
}

MPI_Comm duplicate_world() {
  MPI_Comm comm = MPI_COMM_NULL;
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &comm), "MPI_Comm_dup");
  return comm;
}

std::vector<int> all_ranks(int size) {
  std::vector<int> ranks;
  for (int r = 0; r < size; ++r) ranks.push_back(r);
  return ranks;
}

}  // namespace

struct MpiSession::State {
  explicit State(const MpiOptions& options) : job(options) {}
  MpiJob job;
  std::optional<MpiCommunicator> world;
  bool finalised = false;
};

MpiSession::MpiSession(const MpiOptions& options) {
  initialise(options.expected_ranks);
  state_ = std::make_unique<State>(options);
  state_->world.emplace(state_->job, duplicate_world(), all_ranks(state_->job.size()));
}

MpiSession::~MpiSession() {
  if (state_->finalised || state_->job.failed()) return;
  try {
    finalize();
  } catch (...) {  // a destructor has nobody to tell
  }
}

Communicator& MpiSession::world() {
  return *state_->world;
}

void MpiSession::run(const std::function<void(Communicator& world)>& body) {
  MpiJob& job = state_->job;
  try {
    body(world());
  } catch (const std::exception& error) {
    job.fail(job.rank(), error.what());
    throw;
  } catch (...) {
    job.fail(job.rank(), "an exception of unknown type");
    throw;
  }
}

void MpiSession::finalize() {
  if (std::exchange(state_->finalised, true)) return;
  state_->world.reset();
  state_->job.close();
  check_mpi(MPI_Finalize(), "MPI_Finalize");
}

void MpiSession::abort(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

// It says "Open MPI v4.1.4, package: ...".
std::string mpi_library_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  check_mpi(MPI_Get_library_version(text, &length), "MPI_Get_library_version");
  const std::string all = text;
  const size_t begin = std::min(all.size(), all.find_first_of("0123456789"));
  return all.substr(begin, all.find_first_not_of("0123456789.", begin) - begin);
}

void abort_unfinished_job(int exit_code) {
  int started = 0, finished = 0;
  MPI_Initialized(&started);
  MPI_Finalized(&finished);
  if (started && !finished) MPI_Abort(MPI_COMM_WORLD, exit_code);
}

}  // namespace dstrain
