#include "core/data/data_file.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_STATIC_LINKING_ONLY  // the state as a complete type
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr int64_t kWriteBufferBytes = 1 << 20;
constexpr int64_t kHashChunkBytes = 1 << 20;

}  // namespace

ReadOnlyFile::ReadOnlyFile(const std::string& path) : file_(File::open_read(path)) {
  struct stat info;
  if (::fstat(file_.fd(), &info) != 0) throw_errno("cannot get the size of", path, errno);
  size_ = info.st_size;
  modified_ns_ = int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
}

int64_t ReadOnlyFile::read_some(int64_t offset, void* out, int64_t bytes) const {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t got = ::pread(file_.fd(), static_cast<char*>(out) + done,
                                static_cast<size_t>(bytes - done), offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      throw_errno(fmt::format("cannot read {} bytes at byte {} of", bytes, offset), path(), errno);
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
        path(), offset + got, bytes, offset, size_));
}

AppendFile::AppendFile(const std::string& path, int64_t keep_bytes)
    : file_(File::open_or_create(path)) {
  const int64_t size = file_.size();
  if (size < keep_bytes)
    throw DataError(
        fmt::format("'{}' has {} bytes, but {} were written before", path, size, keep_bytes));
  if (::ftruncate(file_.fd(), keep_bytes) != 0 || ::lseek(file_.fd(), 0, SEEK_END) < 0)
    throw_errno("cannot open for writing", path, errno);
}

void AppendFile::append(const void* data, int64_t bytes) {
  buffer_.append(static_cast<const char*>(data), static_cast<size_t>(bytes));
  if (std::ssize(buffer_) >= kWriteBufferBytes) flush();
}

void AppendFile::flush() {
  file_.write_all(buffer_.data(), std::ssize(buffer_));
  buffer_.clear();
}

void AppendFile::sync() {
  flush();
  file_.sync_data();
}

void AppendFile::close() {
  sync();
  file_.close();
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

std::string hash_text(uint64_t hash) {
  return fmt::format("{:016x}", hash);
}

struct StreamHash::State {
  XXH3_state_t xxh3;
};

StreamHash::StreamHash() : state_(std::make_unique<State>()) {
  XXH3_64bits_reset(&state_->xxh3);
}
StreamHash::StreamHash(StreamHash&&) noexcept = default;
StreamHash::~StreamHash() = default;
void StreamHash::update(const void* data, int64_t bytes) {
  XXH3_64bits_update(&state_->xxh3, data, static_cast<size_t>(bytes));
}
uint64_t StreamHash::digest() const {
  return XXH3_64bits_digest(&state_->xxh3);
}

}  // namespace dstrain
