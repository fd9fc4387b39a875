// One run of mpirun: the process, its output, and its end with everything it started.
#pragma once

#include <signal.h>
#include <sys/types.h>

#include <optional>
#include <string>

#include "apps/launch_plan.h"
#include "apps/mpirun_output.h"
#include "apps/output_relay.h"

namespace dstrain {

// The signals that the launcher acts on, as a descriptor: they are blocked for this thread as long
// as this exists. A signal to leave that was ignored before, as SIGHUP is under nohup, stays so.
class SignalQueue {
 public:
  SignalQueue();
  ~SignalQueue();
  SignalQueue(const SignalQueue&) = delete;
  SignalQueue& operator=(const SignalQueue&) = delete;

  int fd() const { return fd_; }
  // The next one that came, 0 if there is none. The end of a child is SIGCHLD, unless a thread that
  // a library started has taken that.
  int next();

 private:
  sigset_t before_;
  int fd_ = -1;
};

// mpirun runs in a process group of its own, so that a Ctrl-C reaches this process alone, and is
// told to end (SIGTERM) when this process dies in any way. To be used by the process's main thread,
// while a SignalQueue exists.
class MpirunJob {
 public:
  // RuntimeFailure if no process can be started. The relays outlive the job.
  MpirunJob(const MpirunCommand& command, OutputRelay& out, OutputRelay& err);
  ~MpirunJob();  // kills what is left
  MpirunJob(const MpirunJob&) = delete;
  MpirunJob& operator=(const MpirunJob&) = delete;

  // Passes output on until a signal arrives, which the caller takes from the queue, or `seconds`
  // have passed.
  void wait(const SignalQueue& signals, double seconds);
  // Does not wait. Once mpirun has ended, passes on the rest of its output, kills what
  // it left behind, and returns true.
  bool reap();
  void send(int signal) const;

  // After reap() returned true: mpirun's exit code, or 128 + the signal that ended it, and that
  // signal, 0 if there was none.
  int exit_code() const;
  int end_signal() const;
  const std::optional<RankFailure>& failure() const { return messages_.failure(); }

 private:
  bool relay(int& fd, bool is_error);

  OutputRelay &out_, &err_;
  MpirunOutput messages_;
  pid_t pid_ = -1;
  int out_fd_ = -1, err_fd_ = -1;
  std::optional<int> status_;
};

}  // namespace dstrain
