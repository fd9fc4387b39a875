#include "apps/mpirun_job.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fstream>
#include <utility>
#include <vector>

#include "core/base/error.h"
#include "core/base/log.h"

namespace dstrain {
namespace {

constexpr int kNoProgram = 127;
constexpr int kSignalBase = 128;

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (std::string& text : texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

// This process's environment and what the command adds.
std::vector<std::string> environment_of(const MpirunCommand& command) {
  std::vector<std::string> out;
  for (const auto& [name, value] : command.variables) out.push_back(name + "=" + value);
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    bool is_replaced = false;
    for (const auto& [name, value] : command.variables) is_replaced |= text.starts_with(name + "=");
    if (!is_replaced) out.emplace_back(text);
  }
  return out;
}

// Between fork and exec: no allocation, no exceptions.
[[noreturn]] void become(const char* path, char* const* words, char* const* variables, int out,
                         int err, pid_t parent) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (::getppid() != parent) ::_exit(kNoProgram);
  for (int signal = 1; signal < NSIG; ++signal) ::signal(signal, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  const int null = ::open("/dev/null", O_RDONLY);
  ::dup2(null, STDIN_FILENO);
  ::dup2(out, STDOUT_FILENO);
  ::dup2(err, STDERR_FILENO);
  if (null > STDERR_FILENO) ::close(null);
  ::execve(path, words, variables);
  ::_exit(kNoProgram);
}

std::pair<int, int> make_pipe() {
  int fds[2];
  if (::pipe2(fds, O_CLOEXEC) != 0)
    throw RuntimeFailure(std::string("cannot make a pipe to mpirun: ") + std::strerror(errno));
  ::fcntl(fds[0], F_SETFL, O_NONBLOCK);
  return {fds[0], fds[1]};
}

// Processes that mpirun left behind have become ours, since this process adopts them.
void kill_children() {
  const std::string list = fmt::format("/proc/self/task/{}/children", ::getpid());
  constexpr int kRounds = 100;  // a second: a process may start another before it dies
  for (int round = 0; round < kRounds; ++round) {
    std::ifstream file(list);
    for (pid_t child; file >> child;) ::kill(child, SIGKILL);
    pid_t ended;
    while ((ended = ::waitpid(-1, nullptr, WNOHANG)) > 0) {
    }
    if (ended < 0) return;
    ::usleep(10'000);
  }
  log_warning("a process of the last start does not die; it may still hold memory or a GPU");
}

}  // namespace

SignalQueue::SignalQueue() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGCHLD, SIGUSR1}) sigaddset(&set, signal);
  std::signal(SIGCHLD, SIG_DFL);  // ignored, it would hide how mpirun ended
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR2}) {
    struct sigaction action;
    if (::sigaction(signal, nullptr, &action) == 0 && action.sa_handler != SIG_IGN)
      sigaddset(&set, signal);
  }
  ::pthread_sigmask(SIG_BLOCK, &set, &before_);
  fd_ = ::signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
  if (fd_ < 0)
    throw RuntimeFailure(std::string("cannot wait for signals: ") + std::strerror(errno));
}

SignalQueue::~SignalQueue() {
  ::close(fd_);
  ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

int SignalQueue::next() {
  signalfd_siginfo info;
  return ::read(fd_, &info, sizeof info) == static_cast<ssize_t>(sizeof info)
             ? static_cast<int>(info.ssi_signo)
             : 0;
}

MpirunJob::MpirunJob(const MpirunCommand& command, OutputRelay& out, OutputRelay& err)
    : out_(out),
      err_(err),
      messages_([this](std::string_view bytes) { err_.pass(bytes); },
                [](std::string_view message) {
                  message = message.substr(0, message.find_last_not_of(" \n") + 1);
                  log_warning("mpirun: {}", message);
                }) {
  std::vector<std::string> words = command.words, variables = environment_of(command);
  const std::vector<char*> argv = pointers(words), envp = pointers(variables);
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  const auto [out_read, out_write] = make_pipe();
  const auto [err_read, err_write] = make_pipe();
  out_fd_ = out_read;
  err_fd_ = err_read;
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ == 0)
    become(command.path.c_str(), argv.data(), envp.data(), out_write, err_write, parent);
  const int error = errno;
  ::close(out_write);
  ::close(err_write);
  if (pid_ < 0)
    throw RuntimeFailure(std::string("cannot start a process for mpirun: ") + std::strerror(error));
}

MpirunJob::~MpirunJob() {
  if (!status_) {
    send(SIGKILL);
    kill_children();
  }
  for (const int fd : {out_fd_, err_fd_})
    if (fd >= 0) ::close(fd);
}

void MpirunJob::send(int signal) const {
  if (!status_) ::kill(pid_, signal);
}

// Returns whether there may be more.
bool MpirunJob::relay(int& fd, bool is_error) {
  if (fd < 0) return false;
  std::array<char, OutputRelay::kPage> buffer;
  const ssize_t got = ::read(fd, buffer.data(), buffer.size());
  if (got == 0) ::close(std::exchange(fd, -1));
  if (got <= 0) return got < 0 && errno == EINTR;
  const std::string_view bytes(buffer.data(), static_cast<size_t>(got));
  if (is_error)
    messages_.feed(bytes);
  else
    out_.pass(bytes);
  return true;
}

void MpirunJob::wait(const SignalQueue& signals, double seconds) {
  std::vector<pollfd> waits = {{signals.fd(), POLLIN, 0}};
  // While the reader is slow, wait for it instead of for more output.
  if (out_fd_ >= 0)
    waits.push_back(out_.is_ready() ? pollfd{out_fd_, POLLIN, 0} : pollfd{out_.fd(), POLLOUT, 0});
  if (err_fd_ >= 0)
    waits.push_back(err_.is_ready() ? pollfd{err_fd_, POLLIN, 0} : pollfd{err_.fd(), POLLOUT, 0});
  ::poll(waits.data(), waits.size(), static_cast<int>(1e3 * seconds) + 1);
  if (out_.is_ready()) relay(out_fd_, false);
  if (err_.is_ready()) relay(err_fd_, true);
}

bool MpirunJob::reap() {
  int status = 0;
  for (pid_t ended; (ended = ::waitpid(-1, &status, WNOHANG)) > 0;)
    if (ended == pid_) status_ = status;
  if (!status_) return false;
  kill_children();
  while (relay(out_fd_, false) | relay(err_fd_, true)) {
  }
  messages_.finish();
  return true;
}

int MpirunJob::exit_code() const {
  DSTRAIN_CHECK(status_.has_value(), "mpirun has not ended");
  return WIFEXITED(*status_) ? WEXITSTATUS(*status_) : kSignalBase + WTERMSIG(*status_);
}

int MpirunJob::end_signal() const {
  DSTRAIN_CHECK(status_.has_value(), "mpirun has not ended");
  return WIFSIGNALED(*status_) ? WTERMSIG(*status_) : 0;
}

}  // namespace dstrain
