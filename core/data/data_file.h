// Files of token datasets: positioned reads, durable writes, hashes.
//
// Files are read with pread and never mapped: a file that shrinks while a run reads it gives a
// DataError instead of a SIGBUS. All functions throw NotFoundError, PermissionError, StorageError
// (the system refused) or DataError (the content is not as it must be); each names the path.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace dstrain {

// A regular file open for reading. Reads are positioned, so one object may serve many threads.
class ReadOnlyFile {
 public:
  explicit ReadOnlyFile(std::string path);
  ReadOnlyFile(ReadOnlyFile&& other) noexcept;
  ReadOnlyFile& operator=(ReadOnlyFile&& other) noexcept;
  ~ReadOnlyFile();

  const std::string& path() const { return path_; }
  int64_t size() const { return size_; }                // bytes, when the file was opened
  int64_t modified_ns() const { return modified_ns_; }  // since 1970, when the file was opened

  // Reads up to `bytes` bytes at `offset`; fewer only at the end of the file.
  int64_t read_some(int64_t offset, void* out, int64_t bytes) const;
  // Reads exactly `bytes` bytes; DataError if the file ends before.
  void read_exact(int64_t offset, void* out, int64_t bytes) const;

 private:
  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
  int64_t modified_ns_ = 0;
};

// A file that grows at its end, through a buffer. One thread at a time.
class AppendFile {
 public:
  // Opens or creates the file and keeps its first keep_bytes bytes; DataError if it has fewer.
  AppendFile(std::string path, int64_t keep_bytes);
  AppendFile(AppendFile&& other) noexcept;
  AppendFile& operator=(AppendFile&&) = delete;
  ~AppendFile();  // drops what is still in the buffer: call sync() or close() first

  int64_t size() const { return size_; }  // bytes, the buffered ones included
  void append(const void* data, int64_t bytes);
  void flush();  // hands the buffer to the system
  void sync();   // flush, then wait until the bytes are on the storage
  void close();  // sync, then close with the result checked

 private:
  void write_out(const char* data, int64_t bytes);

  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
  std::string buffer_;
};

// Waits until the names in a folder are on the storage.
void sync_folder(const std::string& folder);
// Replaces the file as a whole: after a crash it has the old or the new text.
void replace_file(const std::string& path, std::string_view text);
// The whole file; DataError if it is longer than max_bytes.
std::string read_text_file(const std::string& path, int64_t max_bytes);

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
