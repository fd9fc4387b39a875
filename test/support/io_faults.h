// System calls of this test program that fail on purpose. io_faults.cpp defines open, write, pread,
// fsync, fdatasync, close, mkdir, rename and unlink in front of the C library's; without an
// IoFaults object they do nothing but the real call. Only files below a path prefix are touched.
#pragma once

#include <cstdint>
#include <string>

namespace dstrain {

struct IoFaultPlan {
  std::string path_prefix;
  std::string call;  // "write", "fsync" (also fdatasync), "rename" (also renameat2), ...
  int64_t nth = 1;   // the first pass that fails, from 1
  int error_number = 0;
  bool persistent = false;  // all later passes fail too
  // Instead of failing: of every ten reads and writes, one is interrupted and one moves one byte.
  bool disturb_transfers = false;
  int64_t also_nth = 0;  // one more pass that fails
};

// Active from construction to destruction; one at a time.
class IoFaults {
 public:
  explicit IoFaults(const IoFaultPlan& plan);
  ~IoFaults();
  IoFaults(const IoFaults&) = delete;
  IoFaults& operator=(const IoFaults&) = delete;

  int64_t failed() const;  // calls that failed or were disturbed so far
};

}  // namespace dstrain
