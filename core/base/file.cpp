#include "core/base/file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "core/base/error.h"

namespace dstrain {
namespace {

// Linux moves at most 0x7ffff000 bytes a call; a round number below that keeps offsets aligned.
constexpr int64_t kMaxTransferBytes = int64_t{1} << 30;

int open_retrying(const std::string& path, int flags) {
  int fd;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, 0644);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

[[noreturn]] void throw_open_error(const std::string& action, const std::string& path, int flags,
                                   int error_number) {
  if (error_number == ELOOP && (flags & O_NOFOLLOW) != 0)
    throw DataError(action + " '" + path + "': it is a symbolic link, which is not followed here");
  throw_errno(action, path, error_number);
}

// A file in the place of a device, a pipe or /dev/stdout would be there for every program from then
// on.
void require_replaceable(const std::string& path) {
  constexpr std::string_view kOpenFiles = "/proc/";
  char target[kOpenFiles.size()];
  const ssize_t length = ::readlink(path.c_str(), target, sizeof target);
  const bool is_open_file = length == static_cast<ssize_t>(sizeof target) &&
                            std::string_view(target, sizeof target) == kOpenFiles;
  struct stat info;
  const bool is_special =
      ::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode);
  if (is_open_file || is_special)
    throw StorageError("cannot replace '" + path + "': it is no regular file; name another one");
}

}  // namespace

File::File(File&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}

File& File::operator=(File&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(path_, other.path_);
  return *this;
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

File File::open_read(const std::string& path, Links links) {
  // O_NONBLOCK: opening a pipe must not wait for a writer. It changes nothing for regular files.
  const int flags = O_RDONLY | O_NONBLOCK | (links == Links::refuse ? O_NOFOLLOW : 0);
  const int fd = open_retrying(path, flags);
  if (fd < 0) throw_open_error("cannot open", path, flags, errno);
  File file(fd, path);
  struct stat info;
  if (::fstat(fd, &info) != 0) throw_errno("cannot inspect", path, errno);
  if (!S_ISREG(info.st_mode))
    throw DataError("cannot read '" + path + "': it is not a regular file");
  return file;
}

File File::create_new(const std::string& path) {
  const int flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW;
  const int fd = open_retrying(path, flags);
  if (fd < 0) throw_open_error("cannot create", path, flags, errno);
  return File(fd, path);
}

File File::open_or_create(const std::string& path) {
  const int flags = O_RDWR | O_CREAT | O_NOFOLLOW;
  const int fd = open_retrying(path, flags);
  if (fd < 0) throw_open_error("cannot open", path, flags, errno);
  return File(fd, path);
}

File File::open_folder(const std::string& path) {
  const int fd = open_retrying(path, O_RDONLY | O_DIRECTORY);
  if (fd < 0) throw_errno("cannot open the folder", path, errno);
  return File(fd, path);
}

int64_t File::size() const {
  struct stat info;
  if (::fstat(fd_, &info) != 0) throw_errno("cannot inspect", path_, errno);
  return info.st_size;
}

void File::read_exact_at(void* dst, int64_t bytes, int64_t offset) const {
  char* out = static_cast<char*>(dst);
  int64_t done = 0;
  while (done < bytes) {
    const int64_t chunk = std::min(bytes - done, kMaxTransferBytes);
    const ssize_t n = ::pread(fd_, out + done, static_cast<size_t>(chunk), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw_errno("cannot read", path_, errno);
    if (n == 0)
      throw DataError(
          fmt::format("'{}' ends at byte {}, but bytes {} to {} were wanted; it was cut short",
                      path_, offset + done, offset, offset + bytes));
    done += n;
  }
}

void File::write_all(const void* src, int64_t bytes) {
  const char* in = static_cast<const char*>(src);
  int64_t done = 0;
  while (done < bytes) {
    const int64_t chunk = std::min(bytes - done, kMaxTransferBytes);
    const ssize_t n = ::write(fd_, in + done, static_cast<size_t>(chunk));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw_errno("cannot write", path_, errno);
    if (n == 0) throw_errno("cannot write", path_, EIO);
    done += n;
  }
}

void File::sync_data() {
  // Not repeated after EINTR: a second sync may report success for data that the first one lost.
  if (::fdatasync(fd_) != 0) throw_errno("cannot flush", path_, errno);
}

void File::sync_all() {
  if (::fsync(fd_) != 0) throw_errno("cannot flush", path_, errno);
}

void File::close() {
  const int fd = std::exchange(fd_, -1);
  // Linux releases the descriptor even when close() fails, so it is never repeated.
  if (::close(fd) != 0 && errno != EINTR) throw_errno("cannot close", path_, errno);
}

std::string join_path(std::string_view folder, std::string_view name) {
  std::string out(folder);
  if (!out.empty() && out.back() != '/') out += '/';
  return out.append(name);
}

std::string file_name(std::string_view path) {
  while (path.size() > 1 && path.back() == '/') path.remove_suffix(1);
  const size_t slash = path.rfind('/');
  return std::string(slash == path.npos || path == "/" ? path : path.substr(slash + 1));
}

std::string parent_folder(std::string_view path) {
  while (path.size() > 1 && path.back() == '/') path.remove_suffix(1);
  const size_t slash = path.rfind('/');
  if (slash == path.npos) return ".";
  return std::string(slash == 0 ? "/" : path.substr(0, slash));
}

bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name != "." && name != ".." &&
         name.find('/') == name.npos && name.find('\0') == name.npos;
}

bool path_exists(const std::string& path) {
  struct stat info;
  return ::lstat(path.c_str(), &info) == 0;
}

bool is_folder(const std::string& path) {
  struct stat info;
  return ::stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

void flush_folder(const std::string& path) {
  File folder = File::open_folder(path);
  folder.sync_all();
  folder.close();
}

void create_folders(const std::string& path) {
  if (path.empty() || is_folder(path)) return;
  const std::string parent = parent_folder(path);
  if (parent != path) create_folders(parent);
  if (::mkdir(path.c_str(), 0777) == 0) return flush_folder(parent);
  const int error_number = errno;
  if (error_number == EEXIST && is_folder(path)) return;  // another process was faster
  throw_errno("cannot create the folder", path, error_number);
}

std::string read_small_file(const std::string& path, int64_t max_bytes, Links links) {
  const File file = File::open_read(path, links);
  const int64_t bytes = file.size();
  if (bytes > max_bytes)
    throw DataError(
        fmt::format("'{}' has {} bytes; at most {} are accepted", path, bytes, max_bytes));
  std::string contents(static_cast<size_t>(bytes), '\0');
  file.read_exact_at(contents.data(), bytes, 0);
  return contents;
}

void write_file_atomic(const std::string& path, std::string_view contents) {
  require_replaceable(path);
  const std::string temporary = fmt::format("{}.tmp-{}", path, ::getpid());
  ::unlink(temporary.c_str());  // a leftover of a dead process that had the same id
  File file = File::create_new(temporary);
  try {
    file.write_all(contents.data(), static_cast<int64_t>(contents.size()));
    file.sync_all();
    file.close();
    if (::rename(temporary.c_str(), path.c_str()) != 0) throw_errno("cannot replace", path, errno);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  flush_folder(parent_folder(path));
}

}  // namespace dstrain
