#include "test/support/io_faults.h"

// The fortified forms of these calls are inline functions, which cannot be defined again.
#undef _FORTIFY_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <mutex>
#include <string_view>

namespace dstrain {
namespace {

struct Active {
  std::mutex mutex;
  const IoFaultPlan* plan = nullptr;
  int64_t passes = 0, failed = 0;
};

Active& active() {
  static Active instance;
  return instance;
}

enum class Verdict { proceed, fail, interrupt, shorten };

// What is to happen to this call; errno is set for fail and interrupt.
Verdict judge(std::string_view call, std::string_view path) {
  const std::lock_guard lock(active().mutex);
  const IoFaultPlan* plan = active().plan;
  if (plan == nullptr || !path.starts_with(plan->path_prefix)) return Verdict::proceed;
  if (plan->disturb_transfers) {
    if (call != "write" && call != "pread") return Verdict::proceed;
    const int64_t turn = ++active().passes % 10;
    if (turn != 3 && turn != 7) return Verdict::proceed;
    ++active().failed;
    errno = EINTR;
    return turn == 3 ? Verdict::interrupt : Verdict::shorten;
  }
  if (call != plan->call) return Verdict::proceed;
  const int64_t pass = ++active().passes;
  if (pass != plan->nth && pass != plan->also_nth && !(plan->persistent && pass > plan->nth))
    return Verdict::proceed;
  ++active().failed;
  errno = plan->error_number;
  return Verdict::fail;
}

Verdict judge_fd(std::string_view call, int fd) {
  {
    const std::lock_guard lock(active().mutex);
    if (active().plan == nullptr) return Verdict::proceed;
  }
  char path[4096];
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const ssize_t length = ::readlink(link.c_str(), path, sizeof path);
  return length < 0 ? Verdict::proceed
                    : judge(call, std::string_view(path, static_cast<size_t>(length)));
}

bool stops(Verdict verdict) {
  return verdict == Verdict::fail || verdict == Verdict::interrupt;
}

}  // namespace

IoFaults::IoFaults(const IoFaultPlan& plan) {
  const std::lock_guard lock(active().mutex);
  active().plan = new IoFaultPlan(plan);
  active().passes = active().failed = 0;
}

IoFaults::~IoFaults() {
  const std::lock_guard lock(active().mutex);
  delete active().plan;
  active().plan = nullptr;
}

int64_t IoFaults::failed() const {
  const std::lock_guard lock(active().mutex);
  return active().failed;
}

}  // namespace dstrain

using dstrain::judge;
using dstrain::judge_fd;
using dstrain::stops;
using dstrain::Verdict;

extern "C" {

int open(const char* path, int flags, ...) {
  mode_t mode = 0;
  if ((flags & O_CREAT) != 0) {
    va_list arguments;
    va_start(arguments, flags);
    mode = va_arg(arguments, mode_t);
    va_end(arguments);
  }
  if (stops(judge("open", path))) return -1;
  return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}

ssize_t write(int fd, const void* data, size_t bytes) {
  const Verdict verdict = judge_fd("write", fd);
  if (stops(verdict)) return -1;
  if (verdict == Verdict::shorten) bytes = std::min<size_t>(bytes, 1);
  return ::syscall(SYS_write, fd, data, bytes);
}

ssize_t pread(int fd, void* data, size_t bytes, off_t offset) {
  const Verdict verdict = judge_fd("pread", fd);
  if (stops(verdict)) return -1;
  if (verdict == Verdict::shorten) bytes = std::min<size_t>(bytes, 1);
  return ::syscall(SYS_pread64, fd, data, bytes, offset);
}

int fsync(int fd) {
  if (stops(judge_fd("fsync", fd))) return -1;
  return static_cast<int>(::syscall(SYS_fsync, fd));
}

int fdatasync(int fd) {
  if (stops(judge_fd("fsync", fd))) return -1;
  return static_cast<int>(::syscall(SYS_fdatasync, fd));
}

// As on Linux, the descriptor is gone even when closing reports an error.
int close(int fd) {
  const Verdict verdict = judge_fd("close", fd);
  const int error_number = errno;
  const long result = ::syscall(SYS_close, fd);
  if (!stops(verdict)) return static_cast<int>(result);
  errno = error_number;
  return -1;
}

int mkdir(const char* path, mode_t mode) noexcept {
  if (stops(judge("mkdir", path))) return -1;
  return static_cast<int>(::syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}

int renameat2(int from_folder, const char* from, int to_folder, const char* to,
              unsigned flags) noexcept {
  if (stops(judge("rename", from))) return -1;
  return static_cast<int>(::syscall(SYS_renameat2, from_folder, from, to_folder, to, flags));
}

int rename(const char* from, const char* to) noexcept {
  return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlink(const char* path) noexcept {
  if (stops(judge("unlink", path))) return -1;
  return static_cast<int>(::syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}

}  // extern "C"
