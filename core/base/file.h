// Files as owned descriptors. Every call repeats after EINTR, finishes short reads and writes, and
// turns an errno into an Error that names the action and the path. Nothing here is mapped into
// memory: a file that shrinks under a mapping would end the process with SIGBUS.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace dstrain {

enum class Links {
  follow,  // a symbolic link as the last part of the path is followed
  refuse,  // ... is an error: for files that this program wrote itself
};

// One open file or folder. Movable; a File may be used by one thread at a time, except that
// read_exact_at() may be called from several.
class File {
 public:
  File() = default;
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();  // closes and ignores errors: writers call close()

  // A regular file; anything else (folder, pipe, device) is a DataError.
  static File open_read(const std::string& path, Links links = Links::follow);
  // A new file, mode 0644 less the umask; an existing one is an error.
  static File create_new(const std::string& path);
  // For reading and writing at its start; created where missing. Follows no symbolic link.
  static File open_or_create(const std::string& path);
  static File open_folder(const std::string& path);

  bool is_open() const { return fd_ >= 0; }
  int fd() const { return fd_; }
  const std::string& path() const { return path_; }
  int64_t size() const;

  // DataError if the file ends before offset + bytes.
  void read_exact_at(void* dst, int64_t bytes, int64_t offset) const;
  void write_all(const void* src, int64_t bytes);
  // After a failed sync the kernel may have dropped the data: never sync the same File again.
  void sync_data();
  void sync_all();
  // The descriptor is gone afterwards, also when this throws.
  void close();

 private:
  File(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}

  int fd_ = -1;
  std::string path_;
};

// "folder/name", without doubling the slash.
std::string join_path(std::string_view folder, std::string_view name);
// The part after the last '/', ignoring slashes at the end.
std::string file_name(std::string_view path);
// The part before the last '/': "." or "/" where nothing else is left.
std::string parent_folder(std::string_view path);
// Not empty, at most 255 bytes, no '/', no NUL, neither "." nor "..".
bool is_plain_file_name(std::string_view name);

bool path_exists(const std::string& path);  // also true for a dangling symbolic link
bool is_folder(const std::string& path);    // follows links

// Makes names created, renamed or removed in the folder survive a power cut.
void flush_folder(const std::string& path);
// mkdir -p, mode 0777 less the umask; the new names survive a power cut.
void create_folders(const std::string& path);

// The whole file; DataError above max_bytes, before anything is allocated.
std::string read_small_file(const std::string& path, int64_t max_bytes,
                            Links links = Links::follow);
// The file holds either its old or its new contents, at any instant and after a power cut.
void write_file_atomic(const std::string& path, std::string_view contents);

}  // namespace dstrain
