#include "test/support/run_program.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <iterator>

namespace dstrain::test {
namespace {

constexpr double kPollMs = 0.5;

int open_for_child(const std::string& path, int flags) {
  const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0600);
  REQUIRE(fd >= 0);
  return fd;
}

// Between fork and exec: no allocation, no exceptions.
[[noreturn]] void become(const Launch& launch, char* const* argv, char* const* envp, const int* fds,
                         pid_t parent) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(126);
  // The handlers of the test framework are not for the child.
  for (int signal = 1; signal < NSIG; ++signal) ::signal(signal, SIG_DFL);
  for (const int signal : launch.ignored_signals) ::signal(signal, SIG_IGN);
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  for (int i = 0; i < 3; ++i) ::dup2(fds[i], i);
  if (launch.file_size_limit) {
    const auto bytes = static_cast<rlim_t>(*launch.file_size_limit);
    const rlimit limit{bytes, RLIM_INFINITY};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  if (!launch.folder.empty() && ::chdir(launch.folder.c_str()) != 0) ::_exit(125);
  ::execve(launch.program.c_str(), argv, envp);
  ::_exit(127);
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (std::string& text : texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

// Ours, without what would change the program's behaviour.
std::vector<std::string> child_environment(const Launch& launch) {
  std::vector<std::string> out;
  for (char** entry = environ; *entry != nullptr; ++entry)
    if (std::strncmp(*entry, "DSTRAIN_FAILPOINT=", 18) != 0) out.push_back(*entry);
  if (!launch.failpoint.empty()) out.push_back("DSTRAIN_FAILPOINT=" + launch.failpoint);
  return out;
}

}  // namespace

RunningProgram::RunningProgram(const Launch& launch) : started_(monotonic_seconds()) {
  write_file(files_ / "in", launch.input);
  const int in = open_for_child(files_ / "in", O_RDONLY);
  const int out = open_for_child(files_ / "out", O_WRONLY | O_CREAT | O_APPEND);
  const int err = open_for_child(files_ / "err", O_WRONLY | O_CREAT | O_APPEND);
  const int fds[3] = {in, launch.stdout_fd.value_or(out), launch.stderr_fd.value_or(err)};
  std::vector<std::string> words = {launch.program};
  words.insert(words.end(), launch.args.begin(), launch.args.end());
  std::vector<std::string> variables = child_environment(launch);
  const std::vector<char*> argv = pointers(words), envp = pointers(variables);
  const pid_t parent = ::getpid();
  sigset_t all, before;
  sigfillset(&all);
  ::sigprocmask(SIG_SETMASK, &all, &before);
  pid_ = ::fork();
  if (pid_ == 0) become(launch, argv.data(), envp.data(), fds, parent);
  ::sigprocmask(SIG_SETMASK, &before, nullptr);
  for (const int fd : {in, out, err}) ::close(fd);
  REQUIRE(pid_ > 0);
}

RunningProgram::~RunningProgram() {
  if (pid_ <= 0 || status_) return;
  ::kill(pid_, SIGKILL);
  reap(/*block=*/true);
}

bool RunningProgram::reap(bool block) {
  if (status_) return true;
  int status = 0;
  pid_t got;
  do {
    got = ::waitpid(pid_, &status, block ? 0 : WNOHANG);
  } while (got < 0 && errno == EINTR);
  if (got != pid_) return false;
  status_ = status;
  ended_ = monotonic_seconds();
  return true;
}

std::string RunningProgram::err() const {
  return read_file(files_ / "err");
}

void RunningProgram::send(int signal) const {
  if (!status_) ::kill(pid_, signal);
}

bool RunningProgram::is_running() {
  return !reap(/*block=*/false);
}

bool RunningProgram::wait_until(const std::function<bool()>& condition, double deadline) {
  const double begin = monotonic_seconds();
  while (true) {
    const bool running = is_running();  // before the condition: what it wrote last counts
    if (condition()) return true;
    if (!running) return false;
    if (monotonic_seconds() - begin > deadline) {
      const std::string written = err();
      FAIL("what the test waits for did not happen in " << deadline << " s; the program wrote:\n"
                                                        << written);
    }
    sleep_ms(kPollMs);
  }
}

Finished RunningProgram::wait(double deadline) {
  wait_until([this] { return status_.has_value(); }, deadline);
  Finished finished;
  if (WIFEXITED(*status_)) finished.code = WEXITSTATUS(*status_);
  if (WIFSIGNALED(*status_)) finished.signal = WTERMSIG(*status_);
  finished.out = read_file(files_ / "out");
  finished.err = err();
  finished.seconds = ended_ - started_;
  return finished;
}

Finished run_program(const Launch& launch) {
  return RunningProgram(launch).wait();
}

Finished run_program(const std::vector<std::string>& args, const std::string& folder) {
  Launch launch;
  launch.args = args;
  launch.folder = folder;
  return run_program(launch);
}

double monotonic_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void sleep_ms(double milliseconds) {
  ::usleep(static_cast<useconds_t>(1e3 * milliseconds));
}

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << bytes;
  out.close();
  REQUIRE(out.good());
}

SmallDisk::SmallDisk(const std::string& options) {
  if (::mount("tmpfs", path().c_str(), "tmpfs", 0, options.c_str()) != 0)
    error_ = std::string("mounting a tmpfs is refused: ") + std::strerror(errno);
}

SmallDisk::~SmallDisk() {
  if (mounted()) ::umount2(path().c_str(), MNT_DETACH);
}

void SmallDisk::remount_read_only() {
  REQUIRE(::mount("tmpfs", path().c_str(), "tmpfs", MS_REMOUNT | MS_RDONLY, nullptr) == 0);
}

void print_skipped(const std::string& reason) {
  std::cout << "SKIPPED: " << Catch::getResultCapture().getCurrentTestName() << ": " << reason
            << std::endl;
}

}  // namespace dstrain::test
