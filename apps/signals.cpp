#include "apps/signals.h"

#include <csignal>
#include <unistd.h>

namespace dstrain {
namespace {

// Signal handlers can reach nothing but globals of this type.
volatile std::sig_atomic_t leave_signal = 0;
volatile std::sig_atomic_t save_wanted = 0;

void on_leave(int signal) {
  if (signal == SIGINT && leave_signal == SIGINT) _exit(128 + SIGINT);
  leave_signal = signal;
}

void on_save(int) { save_wanted = 1; }

void handle(int signal, void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  sigaction(signal, &action, nullptr);
}

}  // namespace

void install_signal_handlers() {
  handle(SIGTERM, on_leave);
  handle(SIGINT, on_leave);
  handle(SIGHUP, on_leave);
  handle(SIGUSR2, on_leave);
  handle(SIGUSR1, on_save);
  handle(SIGPIPE, SIG_IGN);
  handle(SIGXFSZ, SIG_IGN);
}

std::string leave_requested() {
  switch (leave_signal) {
    case 0: return "";
    case SIGTERM: return "SIGTERM";
    case SIGINT: return "SIGINT";
    case SIGHUP: return "SIGHUP";
    default: return "SIGUSR2";
  }
}

bool take_save_request() {
  const bool wanted = save_wanted != 0;
  save_wanted = 0;
  return wanted;
}

}  // namespace dstrain
