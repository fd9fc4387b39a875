#include "apps/signals.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

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

// Threads that libraries started while they were loaded, as OpenBLAS does, take signals that this thread
// blocks. Signals that are blocked when a program starts are blocked in all of its threads: so the program
// starts itself once more. OpenBLAS then starts none: a product is called by each thread for its own part.
void start_again_with_blocked(const sigset_t& before, const sigset_t& awaited) {
  bool were_blocked = true;
  for (int signal = 1; signal < NSIG; ++signal)
    were_blocked = were_blocked && (sigismember(&awaited, signal) != 1 || sigismember(&before, signal) == 1);
  if (were_blocked) return;  // no thread lacks the block, or this is the second start
  std::error_code error;
  const std::filesystem::directory_iterator tasks("/proc/self/task", error);
  if (error || std::distance(begin(tasks), end(tasks)) <= 1) return;

  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
  if (words.empty()) return;
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  setenv("OPENBLAS_NUM_THREADS", "1", /*overwrite=*/0);
  execv("/proc/self/exe", argv.data());  // returns if it fails: the first start goes on
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

void hold_signals() {
  const sigset_t set = awaited_signals();
  sigset_t before;
  pthread_sigmask(SIG_BLOCK, &set, &before);
  start_again_with_blocked(before, set);
}

// The signals stay blocked in every thread and one thread waits for them: no handler ever runs on a
// thread that computes. The matrix kernels of oneDNN use the stack pointer for a buffer on the
// heap, so that the frame of a handler would overwrite the heap.
void handle_signals() {
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  hold_signals();
  std::thread(wait_for_signals, awaited_signals()).detach();
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
