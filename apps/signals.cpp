#include "apps/signals.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <initializer_list>
#include <thread>

namespace dstrain {
namespace {

constexpr std::initializer_list<int> kLeaveSignals = {SIGTERM, SIGINT, SIGHUP, SIGUSR2};
constexpr int kSaveSignal = SIGUSR1;

// Globals because signals belong to the process. The waiting thread writes, the trainer reads.
std::atomic<int> leave_signal{0};
std::atomic<bool> save_wanted{false};

// Without those that whoever started the program has it ignore, as nohup does with SIGHUP.
sigset_t awaited_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, kSaveSignal);
  for (const int signal : kLeaveSignals) {
    struct sigaction action;
    if (sigaction(signal, nullptr, &action) == 0 && action.sa_handler != SIG_IGN)
      sigaddset(&set, signal);
  }
  return set;
}

[[noreturn]] void wait_for_signals(sigset_t set) {
  while (true) {
    int signal = 0;
    if (sigwait(&set, &signal) != 0) continue;
    if (signal == kSaveSignal) {
      save_wanted = true;
      continue;
    }
    if (signal == SIGINT && leave_signal == SIGINT) _exit(128 + SIGINT);
    leave_signal = signal;
  }
}

}  // namespace

// The signals stay blocked in every thread and one thread waits for them: no handler ever runs on a
// thread that computes. The matrix kernels of oneDNN use the stack pointer for a buffer on the
// heap, so that the frame of a handler would overwrite the heap.
void handle_signals() {
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  const sigset_t set = awaited_signals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  std::thread(wait_for_signals, set).detach();
}

std::string leave_requested() {
  switch (leave_signal) {
    case 0:
      return "";
    case SIGTERM:
      return "SIGTERM";
    case SIGINT:
      return "SIGINT";
    case SIGHUP:
      return "SIGHUP";
    default:
      return "SIGUSR2";
  }
}

bool take_save_request() {
  return save_wanted.exchange(false);
}

}  // namespace dstrain
