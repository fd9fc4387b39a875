#include "apps/launch_machine.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string_view>

#include "apps/launch_variables.h"
#include "core/backend/cpu_backend.h"
#include "core/base/error.h"
#include "core/base/file.h"

namespace dstrain {
namespace {

namespace fs = std::filesystem;

// Docker and Podman leave a file, Kubernetes a variable, others a name in the control groups.
bool is_container(const Variables& variables) {
  if (path_exists("/.dockerenv") || path_exists("/run/.containerenv")) return true;
  if (variables("KUBERNETES_SERVICE_HOST") != nullptr || variables("container") != nullptr)
    return true;
  std::ifstream file("/proc/1/cgroup");
  const std::string groups{std::istreambuf_iterator<char>(file), {}};
  for (const char* name : {"docker", "kubepods", "containerd", "lxc", "libpod"})
    if (groups.find(name) != groups.npos) return true;
  return false;
}

// Whether process_vm_readv works between processes of this user. Containers without CAP_SYS_PTRACE
// and hardened kernels refuse it. A child is read from, since it cannot be tried on oneself.
bool can_read_processes() {
  const int here = 1;
  int ready[2];
  if (::pipe2(ready, O_CLOEXEC) != 0) return false;
  const pid_t child = ::fork();
  if (child == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    char byte;
    ::close(ready[1]);
    const ssize_t ignored = ::read(ready[0], &byte, 1);  // until the parent is done
    ::_exit(ignored < 0 ? 1 : 0);
  }
  int there = 0;
  iovec to{&there, sizeof there}, from{const_cast<int*>(&here), sizeof here};
  const bool works = child > 0 && ::process_vm_readv(child, &to, 1, &from, 1, 0) ==
                                      static_cast<ssize_t>(sizeof here);
  ::close(ready[0]);
  ::close(ready[1]);
  if (child > 0)
    while (::waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
    }
  return works && there == here;
}

bool is_executable(const std::string& path) {
  std::error_code ignored;
  return fs::is_regular_file(path, ignored) && ::access(path.c_str(), X_OK) == 0;
}

// As a shell looks a command up; empty if there is none.
std::string find_program(const std::string& name, const char* search) {
  if (name.find('/') != name.npos) return is_executable(name) ? name : "";
  std::string_view folders = search != nullptr ? search : "/usr/local/bin:/usr/bin:/bin";
  while (!folders.empty()) {
    const size_t colon = std::min(folders.find(':'), folders.size());
    const std::string path = join_path(folders.substr(0, colon), name);
    if (colon > 0 && is_executable(path)) return path;
    folders.remove_prefix(std::min(colon + 1, folders.size()));
  }
  return "";
}

using Clock = std::chrono::steady_clock;

// What comes through the pipe until its end; none if that has not come by `deadline`.
std::optional<std::string> read_all(int fd, Clock::time_point deadline) {
  std::string text;
  std::array<char, 1024> buffer;
  while (true) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    pollfd waited{fd, POLLIN, 0};
    const int ready = ::poll(&waited, 1, std::max(0, static_cast<int>(left.count())));
    if (ready == 0) return std::nullopt;
    const ssize_t got = ready < 0 ? ready : ::read(fd, buffer.data(), buffer.size());
    if (got == 0 || (got < 0 && errno != EINTR)) return text;
    if (got > 0) text.append(buffer.data(), static_cast<size_t>(got));
  }
}

// Whether the child has ended by `deadline`.
bool has_ended(pid_t child, Clock::time_point deadline) {
  while (true) {
    const pid_t ended = ::waitpid(child, nullptr, WNOHANG);
    if (ended == child || (ended < 0 && errno != EINTR)) return true;
    if (Clock::now() >= deadline) return false;
    ::usleep(1000);
  }
}

// What `PATH --version` prints on standard output; empty if it cannot be run, none if it does not
// come to an end within `seconds`.
std::optional<std::string> version_text(const std::string& path, double seconds) {
  int fds[2];
  if (::pipe2(fds, O_CLOEXEC) != 0) return "";
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, fds[1], STDOUT_FILENO);
  ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawnattr_t attributes;  // a Ctrl-C ends a program that does not answer
  ::posix_spawnattr_init(&attributes);
  sigset_t none;
  sigemptyset(&none);
  ::posix_spawnattr_setsigmask(&attributes, &none);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
  std::string option = "--version", name = path;
  char* const words[] = {name.data(), option.data(), nullptr};
  pid_t child = -1;
  const int error = ::posix_spawn(&child, path.c_str(), &actions, &attributes, words, environ);
  ::posix_spawn_file_actions_destroy(&actions);
  ::posix_spawnattr_destroy(&attributes);
  ::close(fds[1]);
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                           std::chrono::duration<double>(seconds));
  std::optional<std::string> text = error == 0 ? read_all(fds[0], deadline) : "";
  ::close(fds[0]);
  if (error != 0 || has_ended(child, deadline)) return text;
  ::kill(child, SIGKILL);  // and not waited for: it may hang in a call that ends for no signal
  return std::nullopt;
}

}  // namespace

Machine look_at_machine(const Variables& variables) {
  Machine machine;
  machine.name = machine_name();
  machine.cores = available_cores();
  machine.is_root = ::geteuid() == 0;
  machine.is_container = is_container(variables);
  machine.allows_root = variables("OMPI_ALLOW_RUN_AS_ROOT") != nullptr &&
                        variables("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM") != nullptr;
  machine.can_read_processes = can_read_processes();
  return machine;
}

Mpirun find_mpirun(const Variables& variables, const std::string& reason, double answer_s) {
  const char* chosen = variables(kMpirunVariable);
  Mpirun mpirun;
  if (chosen != nullptr && *chosen != '\0') mpirun.name = chosen;
  mpirun.path = find_program(mpirun.name, variables("PATH"));
  if (mpirun.path.empty())
    throw RuntimeFailure(fmt::format(
        "{} needs Open MPI's mpirun, and there is no program '{}'{}; install Open MPI (Debian: "
        "openmpi-bin), or name its mpirun in the environment variable {}",
        reason, mpirun.name, mpirun.name.find('/') == std::string::npos ? " in PATH" : "",
        kMpirunVariable));
  const std::optional<std::string> answer = version_text(mpirun.path, answer_s);
  if (!answer)
    throw RuntimeFailure(fmt::format(
        "{} needs Open MPI's mpirun, and '{} --version' has not answered within {:g} s; try it by "
        "hand: a file system or a wrapper in PATH may hang. The environment variable {} names "
        "another one",
        reason, mpirun.path, answer_s, kMpirunVariable));
  const std::string& text = *answer;
  constexpr std::string_view kBefore = "(Open MPI) ";
  const size_t at = text.find(kBefore);
  if (at != text.npos) {
    const char* begin = text.data() + at + kBefore.size();
    std::from_chars(begin, text.data() + text.size(), mpirun.major);
  }
  if (mpirun.major < 1)
    throw RuntimeFailure(fmt::format(
        "{} needs Open MPI's mpirun, and '{} --version' does not say that it is one{}; name the "
        "right one in the environment variable {}",
        reason, mpirun.path,
        text.empty() ? "" : fmt::format(" ('{}')", text.substr(0, text.find('\n'))),
        kMpirunVariable));
  return mpirun;
}

std::string program_path() {
  std::error_code error;
  const fs::path path = fs::read_symlink("/proc/self/exe", error);
  if (error)
    throw_errno("cannot find the file of this program through", "/proc/self/exe", error.value());
  return path;
}

std::string temporary_folder(const Variables& variables) {
  const char* folder = variables("TMPDIR");
  return folder != nullptr && *folder != '\0' ? folder : "/tmp";
}

}  // namespace dstrain
