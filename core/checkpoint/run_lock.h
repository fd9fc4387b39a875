// Ownership of a run folder: one training process per folder, checked before the first step.
#pragma once

#include <string>

#include "core/base/file.h"

namespace dstrain {

// Creates the run folder where it is missing and proves that files can be created in it.
// ConfigError if the path can not be a folder (a file, a dangling symbolic link, too long),
// PermissionError naming the path and the user if it may not be written.
void prepare_run_folder(const std::string& path);
// The same without creating anything: what is there must be a folder that may be written.
void check_run_folder(const std::string& path);

// Holds <run folder>/run.lock until destroyed or the process ends, however it ends. A child process
// made by fork() alone would share it; one made by exec() does not.
class RunLock {
 public:
  // RuntimeFailure naming the holder if another process has the folder. Logs a warning when the
  // last holder died without releasing, and when the file system knows no locks.
  explicit RunLock(const std::string& run_folder);
  RunLock(RunLock&&) noexcept = default;
  RunLock& operator=(RunLock&&) = delete;
  ~RunLock();

  // Removes the file too: for a folder that this process made and gives up.
  void remove_file() noexcept;

 private:
  File file_;
};

}  // namespace dstrain
