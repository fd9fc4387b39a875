// Ownership of a run folder: one run per folder, checked before anything starts.
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

// Holds a file of the run folder until destroyed or the process ends, however it ends. A child
// process made by fork() alone would share it; one made by exec() does not.
class RunLock {
 public:
  // What the file stands for. Both, since ranks live on for a moment when their launcher is killed:
  // whoever wants to start a run takes the run and then finds the ranks gone, or is refused.
  enum class Part {
    run,    // run.lock: held by the run's launcher, or by the first rank where there is none
    ranks,  // ranks.lock: held by the first rank while it trains
  };

  // RuntimeFailure naming the holder if another process has that part. Of the run, logs a warning
  // when the last holder died without releasing, and when the file system knows no locks, where
  // the lock is taken to be held.
  explicit RunLock(const std::string& run_folder, Part part = Part::run);
  RunLock(RunLock&&) noexcept = default;
  RunLock& operator=(RunLock&&) = delete;
  ~RunLock();

  // Removes the file too: for a folder that this process made and gives up.
  void remove_file() noexcept;

 private:
  File file_;
};

}  // namespace dstrain
