#include "core/checkpoint/run_lock.h"

#include <fmt/format.h>
#include <pwd.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <ctime>
#include <thread>

#include "core/base/error.h"
#include "core/base/log.h"

namespace dstrain {
namespace {

const char* file_name_of(RunLock::Part part) {
  return part == RunLock::Part::run ? "run.lock" : "ranks.lock";
}

constexpr int64_t kMaxLockFileBytes = 4096;

std::string user_name() {
  const uid_t uid = ::geteuid();
  passwd entry{};
  passwd* found = nullptr;
  char buffer[4096];
  if (::getpwuid_r(uid, &entry, buffer, sizeof buffer, &found) == 0 && found != nullptr)
    return fmt::format("'{}' (uid {})", found->pw_name, uid);
  return fmt::format("uid {}", uid);
}

std::string host_name() {
  char name[HOST_NAME_MAX + 1] = {};
  return ::gethostname(name, sizeof name - 1) == 0 ? name : "unknown host";
}

std::string holder_text() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char started[32];
  std::strftime(started, sizeof started, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return fmt::format("process {} on host {}, started {}\n", ::getpid(), host_name(), started);
}

// The holder's own words, made safe to print: anybody may have written to the file.
std::string read_holder(const File& file) {
  std::string text(static_cast<size_t>(std::min(file.size(), kMaxLockFileBytes)), '\0');
  file.read_exact_at(text.data(), static_cast<int64_t>(text.size()), 0);
  text.resize(std::min(text.find('\n'), text.size()));
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < 0x20 || c > 0x7E; }, '?');
  return text;
}

// Between taking the lock and writing who did it there is a moment.
std::string await_holder(const File& file) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    if (std::string holder = read_holder(file); !holder.empty()) return holder;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return "another process";
}

void refuse_permission(const std::string& path, const std::string& why) {
  throw PermissionError(
      fmt::format("run folder '{}' is not writable for user {}: {}", path, user_name(), why));
}

// Every part of the path that exists must be a folder, or a link to one.
void check_path(const std::string& path) {
  if (path.empty()) throw ConfigError("the run folder has no name; set run.dir and run.name");
  for (size_t end = 1; end <= path.size(); ++end) {
    if (end < path.size() && path[end] != '/') continue;
    const std::string part = path.substr(0, end);
    if (file_name(part).size() > NAME_MAX)
      throw ConfigError(fmt::format(
          "run folder '{}': a name in it has more than {} bytes; shorten run.dir or run.name", path,
          NAME_MAX));
    if (!path_exists(part) || is_folder(part)) continue;
    if (::access(part.c_str(), F_OK) != 0 && errno == ENOENT)
      throw ConfigError(fmt::format(
          "run folder '{}': '{}' is a symbolic link to nothing; remove it or create its target",
          path, part));
    throw ConfigError(fmt::format(
        "run folder '{}': '{}' is a file, not a folder; change run.dir or run.name", path, part));
  }
}

}  // namespace

void check_run_folder(const std::string& path) {
  check_path(path);
  std::string there = path;
  while (!path_exists(there)) there = parent_folder(there);
  if (::access(there.c_str(), W_OK | X_OK) != 0)
    refuse_permission(path, fmt::format("cannot write to '{}': {}", there, std::strerror(errno)));
}

void prepare_run_folder(const std::string& path) {
  check_path(path);
  const std::string probe = join_path(path, fmt::format("probe-{}", ::getpid()));
  try {
    create_folders(path);
    ::unlink(probe.c_str());
    File::create_new(probe).close();
  } catch (const PermissionError& error) {
    refuse_permission(path, error.what());
  }
  ::unlink(probe.c_str());
}

RunLock::RunLock(const std::string& run_folder, Part part)
    : file_(File::open_or_create(join_path(run_folder, file_name_of(part)))) {
  if (::flock(file_.fd(), LOCK_EX | LOCK_NB) != 0) {
    const int error_number = errno;
    if (error_number == EWOULDBLOCK)
      throw RuntimeFailure(fmt::format(
          "run folder '{}' is in use by {}. Wait for that run, stop it, or set another run.name",
          run_folder, await_holder(file_)));
    if (error_number != ENOSYS && error_number != EOPNOTSUPP && error_number != ENOLCK)
      throw_errno("cannot lock", file_.path(), error_number);
    if (part == Part::run)
      log_warning(
          "'{}' lies on a file system without locks: a second run in this folder would not be "
          "noticed",
          run_folder);
  }
  struct stat entry {};
  if (::fstat(file_.fd(), &entry) != 0 || entry.st_nlink == 0)
    throw RuntimeFailure(fmt::format(
        "run folder '{}' was given up by another run just now; start again", run_folder));
  const std::string previous = read_holder(file_);
  if (!previous.empty() && part == Part::run)
    log_warning("run folder '{}' was left by {}, which ended without releasing it; taking it over",
                run_folder, previous);
  const std::string holder = holder_text();
  if (::ftruncate(file_.fd(), 0) != 0) throw_errno("cannot write", file_.path(), errno);
  file_.write_all(holder.data(), static_cast<int64_t>(holder.size()));
  ::fdatasync(file_.fd());  // for other hosts of a network file system, as well as it can
}

void RunLock::remove_file() noexcept {
  ::unlink(file_.path().c_str());
}

// The file stays: removing it would let a third process lock a new one beside a waiting second.
RunLock::~RunLock() {
  if (file_.is_open() && ::ftruncate(file_.fd(), 0) != 0)
    log_warning("cannot empty '{}': the next run will report it as left behind", file_.path());
}

}  // namespace dstrain
