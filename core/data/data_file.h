// Files of token datasets: positioned reads, buffered durable writes, hashes.
//
// Files are read with pread and never mapped: a file that shrinks while a run reads it gives a
// DataError instead of a SIGBUS. All functions throw NotFoundError, PermissionError, StorageError
// (the system refused) or DataError (the content is not as it must be); each names the path.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/base/file.h"

namespace dstrain {

// A regular file open for reading. Reads are positioned, so one object may serve many threads.
class ReadOnlyFile {
 public:
  explicit ReadOnlyFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  int64_t size() const { return size_; }                // bytes, when the file was opened
  int64_t modified_ns() const { return modified_ns_; }  // since 1970, when the file was opened

  // Reads up to `bytes` bytes at `offset`; fewer only at the end of the file.
  int64_t read_some(int64_t offset, void* out, int64_t bytes) const;
  // Reads exactly `bytes` bytes; DataError if the file ends before.
  void read_exact(int64_t offset, void* out, int64_t bytes) const;

 private:
  File file_;
  int64_t size_ = 0;
  int64_t modified_ns_ = 0;
};

// A file that grows at its end, through a buffer. One thread at a time. What is still in the buffer
// at the end is dropped: call sync() or close() first.
class AppendFile {
 public:
  // Opens or creates the file and keeps its first keep_bytes bytes; DataError if it has fewer.
  AppendFile(const std::string& path, int64_t keep_bytes);

  void append(const void* data, int64_t bytes);
  void sync();   // returns when everything appended is on the storage
  void close();  // sync, then close with the result checked

 private:
  void flush();

  File file_;
  std::string buffer_;
};

// XXH3, 64 bits.
uint64_t hash_bytes(const void* data, int64_t bytes);
uint64_t hash_file(const std::string& path);
std::string hash_text(uint64_t hash);  // 16 hexadecimal digits

// XXH3 of bytes that arrive in parts.
class StreamHash {
 public:
  StreamHash();
  StreamHash(StreamHash&&) noexcept;
  ~StreamHash();
  void update(const void* data, int64_t bytes);
  uint64_t digest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dstrain
