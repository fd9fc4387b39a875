// A file that grows by whole records and never stops the run. A record is appended by one write and
// is in the kernel's hands when append() returns, so killing the process loses none of it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace dstrain {

class RecordFile {
 public:
  // Opens or creates the file. `header` precedes the first record wherever the file is empty, also
  // when it had to be created again. Throws NotFoundError, PermissionError or StorageError if it
  // cannot be opened.
  explicit RecordFile(std::string path, std::string header = {});
  ~RecordFile();
  RecordFile(const RecordFile&) = delete;
  RecordFile& operator=(const RecordFile&) = delete;

  // Appends all of `record` or none of it. The first failure is logged as a warning with path and
  // reason; every later call tries again, and the first that succeeds logs how much was lost.
  // A file that was removed is created anew where its folder still exists.
  bool append(std::string_view record);

  const std::string& path() const { return path_; }

 private:
  bool open();
  bool try_append(std::string_view record);
  bool write_at_end(std::string_view bytes);
  void close();

  const std::string path_;
  const std::string header_;
  int fd_ = -1;
  bool regular_ = false;  // a device has no end to cut a torn record back to
  int64_t size_ = 0;      // end of the last whole record
  bool torn_ = false;     // bytes of a failed write lie past size_
  int64_t lost_records_ = 0;
};

}  // namespace dstrain
