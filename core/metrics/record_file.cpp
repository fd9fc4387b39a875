#include "core/metrics/record_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/base/error.h"
#include "core/base/log.h"

namespace dstrain {

RecordFile::RecordFile(std::string path, std::string header)
    : path_(std::move(path)), header_(std::move(header)) {
  if (!open()) throw_errno("cannot open", path_, errno);
}

RecordFile::~RecordFile() {
  close();
}

void RecordFile::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

bool RecordFile::open() {
  // Non-blocking only so that a FIFO without a reader is an error instead of a hang.
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0666);
  struct stat info;
  if (fd_ < 0 || ::fstat(fd_, &info) != 0) return false;
  regular_ = S_ISREG(info.st_mode);
  size_ = regular_ ? info.st_size : 0;
  torn_ = false;
  return true;
}

bool RecordFile::append(std::string_view record) {
  if (try_append(record)) {
    if (lost_records_ > 0)
      log_info("'{}' can be written again; records lost: {}", path_, lost_records_);
    lost_records_ = 0;
    return true;
  }
  if (lost_records_++ == 0)
    log_warning("cannot write '{}': {}; training goes on without it", path_, std::strerror(errno));
  return false;
}

// False with errno set. Looks at the link count first, because writing to a file that somebody
// removed succeeds and leaves nothing behind.
bool RecordFile::try_append(std::string_view record) {
  struct stat info;
  if (fd_ >= 0 && ::fstat(fd_, &info) == 0) {
    if (info.st_nlink == 0)
      close();
    else if (regular_ && !torn_)
      size_ = info.st_size;  // somebody may have emptied it
  }
  if (fd_ < 0 && !open()) return false;
  if (torn_ && ::ftruncate(fd_, size_) != 0) return false;
  torn_ = false;
  if (size_ == 0 && !header_.empty() && !write_at_end(header_)) return false;
  return write_at_end(record);
}

bool RecordFile::write_at_end(std::string_view bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t written = ::write(fd_, bytes.data() + done, bytes.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      const int reason = written < 0 ? errno : ENOSPC;
      torn_ = regular_ && done > 0 && ::ftruncate(fd_, size_) != 0;
      errno = reason;
      return false;
    }
    done += static_cast<size_t>(written);
  }
  size_ += static_cast<int64_t>(bytes.size());
  return true;
}

}  // namespace dstrain
