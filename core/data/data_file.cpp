#include "core/data/data_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_STATIC_LINKING_ONLY  // the state as a complete type
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr int64_t kWriteBufferBytes = 1 << 20;
constexpr int64_t kHashChunkBytes = 1 << 20;

}  // namespace

ReadOnlyFile::ReadOnlyFile(std::string path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a pipe without a writer must not hang; regular files ignore it.
  fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) throw_errno("cannot open", path_, errno);
  struct stat info;
  const int failed = ::fstat(fd_, &info) == 0 ? 0 : errno;
  if (failed != 0 || !S_ISREG(info.st_mode)) {
    ::close(std::exchange(fd_, -1));  // the destructor does not run when a constructor throws
    if (failed != 0) throw_errno("cannot get the size of", path_, failed);
    throw DataError(fmt::format("'{}' is {}, expected a regular file", path_,
                                S_ISDIR(info.st_mode) ? "a folder" : "a pipe or a device"));
  }
  size_ = info.st_size;
  modified_ns_ = int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
}

ReadOnlyFile::ReadOnlyFile(ReadOnlyFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      size_(other.size_),
      modified_ns_(other.modified_ns_) {}

ReadOnlyFile& ReadOnlyFile::operator=(ReadOnlyFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  std::swap(modified_ns_, other.modified_ns_);
  return *this;
}

ReadOnlyFile::~ReadOnlyFile() {
  if (fd_ >= 0) ::close(fd_);
}

int64_t ReadOnlyFile::read_some(int64_t offset, void* out, int64_t bytes) const {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t got = ::pread(fd_, static_cast<char*>(out) + done,
                                static_cast<size_t>(bytes - done), offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      throw_errno(fmt::format("cannot read {} bytes at byte {} of", bytes, offset), path_, errno);
    if (got == 0) break;
    done += got;
  }
  return done;
}

void ReadOnlyFile::read_exact(int64_t offset, void* out, int64_t bytes) const {
  const int64_t got = read_some(offset, out, bytes);
  if (got < bytes)
    throw DataError(fmt::format(
        "'{}' ends at byte {}, but {} bytes at byte {} are needed: it was truncated (it had {} "
        "bytes when it was opened); restore the file or build the dataset again",
        path_, offset + got, bytes, offset, size_));
}

AppendFile::AppendFile(std::string path, int64_t keep_bytes)
    : path_(std::move(path)), size_(keep_bytes) {
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
  if (fd_ < 0) throw_errno("cannot open for writing", path_, errno);
  struct stat info;
  int failed = ::fstat(fd_, &info) == 0 ? 0 : errno;
  const bool too_short = failed == 0 && info.st_size < keep_bytes;
  if (failed == 0 && !too_short &&
      (::ftruncate(fd_, keep_bytes) != 0 || ::lseek(fd_, 0, SEEK_END) < 0))
    failed = errno;
  if (failed != 0 || too_short) ::close(std::exchange(fd_, -1));
  if (failed != 0) throw_errno("cannot open for writing", path_, failed);
  if (too_short)
    throw DataError(fmt::format("'{}' has {} bytes, but {} were written before", path_,
                                int64_t{info.st_size}, keep_bytes));
}

AppendFile::AppendFile(AppendFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      size_(other.size_),
      buffer_(std::move(other.buffer_)) {}

AppendFile::~AppendFile() {
  if (fd_ >= 0) ::close(fd_);
}

void AppendFile::append(const void* data, int64_t bytes) {
  const char* text = static_cast<const char*>(data);
  size_ += bytes;
  if (bytes >= kWriteBufferBytes) {
    flush();
    write_out(text, bytes);
    return;
  }
  buffer_.append(text, static_cast<size_t>(bytes));
  if (std::ssize(buffer_) >= kWriteBufferBytes) flush();
}

void AppendFile::flush() {
  write_out(buffer_.data(), std::ssize(buffer_));
  buffer_.clear();
}

void AppendFile::write_out(const char* data, int64_t bytes) {
  while (bytes > 0) {
    const ssize_t written = ::write(fd_, data, static_cast<size_t>(bytes));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw_errno("cannot write to", path_, errno);
    data += written;
    bytes -= written;
  }
}

void AppendFile::sync() {
  flush();
  if (::fdatasync(fd_) != 0) throw_errno("cannot bring to the storage", path_, errno);
}

void AppendFile::close() {
  sync();
  if (::close(std::exchange(fd_, -1)) != 0) throw_errno("cannot close", path_, errno);
}

void sync_folder(const std::string& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) throw_errno("cannot open the folder", folder, errno);
  // Some network file systems cannot sync a folder and say EINVAL; nothing more can be done there.
  const int failed = ::fsync(fd) != 0 && errno != EINVAL ? errno : 0;
  ::close(fd);
  if (failed != 0) throw_errno("cannot bring to the storage", folder, failed);
}

void replace_file(const std::string& path, std::string_view text) {
  const std::string temporary = path + ".tmp";
  AppendFile file(temporary, 0);
  file.append(text.data(), std::ssize(text));
  file.close();
  if (::rename(temporary.c_str(), path.c_str()) != 0)
    throw_errno("cannot rename a finished file to", path, errno);
  const std::string folder = std::filesystem::path(path).parent_path();
  sync_folder(folder.empty() ? "." : folder);
}

std::string read_text_file(const std::string& path, int64_t max_bytes) {
  const ReadOnlyFile file(path);
  if (file.size() > max_bytes)
    throw DataError(fmt::format("'{}' has {} bytes, expected at most {}: it is not the file it "
                                "should be", path, file.size(), max_bytes));
  std::string text(static_cast<size_t>(file.size()), '\0');
  file.read_exact(0, text.data(), file.size());
  return text;
}

uint64_t hash_bytes(const void* data, int64_t bytes) {
  return XXH3_64bits(data, static_cast<size_t>(bytes));
}

uint64_t hash_file(const std::string& path) {
  const ReadOnlyFile file(path);
  StreamHash hash;
  std::vector<char> chunk(static_cast<size_t>(std::min(kHashChunkBytes, file.size() + 1)));
  for (int64_t offset = 0;;) {
    const int64_t got = file.read_some(offset, chunk.data(), std::ssize(chunk));
    hash.update(chunk.data(), got);
    offset += got;
    if (got < std::ssize(chunk)) return hash.digest();
  }
}

std::string hash_text(uint64_t hash) { return fmt::format("{:016x}", hash); }

struct StreamHash::State {
  XXH3_state_t xxh3;
};

StreamHash::StreamHash() : state_(std::make_unique<State>()) { XXH3_64bits_reset(&state_->xxh3); }
StreamHash::StreamHash(StreamHash&&) noexcept = default;
StreamHash::~StreamHash() = default;
void StreamHash::update(const void* data, int64_t bytes) {
  XXH3_64bits_update(&state_->xxh3, data, static_cast<size_t>(bytes));
}
uint64_t StreamHash::digest() const { return XXH3_64bits_digest(&state_->xxh3); }

}  // namespace dstrain
