// Runs one command and turns every failure into a sentence and an exit code.
#include <fcntl.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <system_error>

#include "apps/cli.h"
#include "apps/rank_process.h"
#include "apps/signals.h"
#include "core/base/error.h"
#include "core/base/log.h"
#include "core/base/progress.h"
#include "core/checkpoint/failpoint.h"
#include "parallel/mpi_session.h"

namespace {

using dstrain::ExitCode;

int fail(ExitCode code, const char* prefix, const char* text, bool is_peer_failure = false) {
  if (!is_peer_failure) dstrain::tell_failure(std::getenv, static_cast<int>(code));
  // When a rank has ended its job, mpirun sends SIGTERM to the others.
  const auto is_terminated = [] { return dstrain::leave_requested() == "SIGTERM"; };
  const bool was_terminated = is_terminated();
  const std::optional<std::string> rank = dstrain::failing_rank_prefix(
      std::getenv, is_peer_failure, [&] { return !was_terminated && is_terminated(); });
  if (rank) std::fprintf(stderr, "%s%s%s\n", rank->c_str(), prefix, text);
  // Where mpirun ends the job already, it might tell an abort of this rank as the reason.
  const bool is_ended = !rank && std::getenv("OMPI_COMM_WORLD_RANK") != nullptr;
  if (!is_ended) dstrain::abort_unfinished_job(static_cast<int>(code));
  return static_cast<int>(code);
}

// Where one of them is closed, the first file that is opened would take its number, and what is
// printed would go into that file. Reading and writing go on failing.
void fill_closed_streams() {
  for (const int fd : {0, 1, 2})
    if (::fcntl(fd, F_GETFD) < 0)
      if (::open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) < 0) return;
}

int run(int argc, char** argv) {
  try {
    dstrain::LogOptions log;
    log.color = dstrain::decide_color(dstrain::ColorMode::automatic, /*fd=*/2,
                                      std::getenv("NO_COLOR"), std::getenv("TERM"));
    dstrain::init_log(log);
#ifdef DSTRAIN_FAILPOINTS
    if (const char* spec = std::getenv("DSTRAIN_FAILPOINT")) dstrain::configure_failpoints(spec);
#endif
    return dstrain::parse_command_line({argv + (argc > 0), argv + argc}).run();
  } catch (const dstrain::ConfigProblems& e) {
    return fail(e.code(), "", e.what());  // a report with its own "error:" on each problem
  } catch (const dstrain::PeerFailure& e) {
    return fail(e.code(), "error: ", e.what(), /*is_peer_failure=*/true);
  } catch (const dstrain::Error& e) {
    return fail(e.code(), "error: ", e.what());
  } catch (const std::bad_alloc&) {
    return fail(ExitCode::failure, "error: ", "out of memory");
  } catch (const std::system_error& e) {
    // Of a thread that could not be started; files have errors of their own.
    const std::string text =
        std::string("cannot start a thread: ") + e.what() +
        "; the limit of memory (ulimit -v) or of processes (ulimit -u) is too low";
    const bool is_thread = e.code() == std::errc::resource_unavailable_try_again;
    return fail(ExitCode::failure, "error: ", is_thread ? text.c_str() : e.what());
  } catch (const std::exception& e) {
    return fail(ExitCode::failure, "error: ", e.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  fill_closed_streams();
  // A reader that goes away, as in `... | head`, must not end a training run.
  std::signal(SIGPIPE, SIG_IGN);
  // A micro-batch of a deep model is more launches than a GPU's queue takes by default, 1024: the
  // host would wait in the middle of one. The driver reads this when it starts.
  setenv("CUDA_SCALE_LAUNCH_QUEUES", "4x", /*overwrite=*/0);
  const int code = run(argc, argv);
  // Results that could not be written are a failure, unless nobody wanted the rest of them.
  errno = 0;
  const bool is_lost = std::fflush(stdout) != 0 || std::ferror(stdout) != 0;
  if (!is_lost || errno == EPIPE || code != 0) return code;
  return fail(ExitCode::storage, "error: ", "cannot write to standard output");
}
