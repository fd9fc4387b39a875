// The folder of a run: made and locked for one run, and the checkpoint that a run goes on from.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "apps/assemble.h"
#include "core/checkpoint/run_lock.h"
#include "core/checkpoint/store.h"

namespace dstrain {

// Which part of a run a process is: all of it, the launcher, or the first of a launcher's ranks.
enum class RunRole { alone, launcher, ranks };

// Owns the folder until destroyed. What it had to make goes again unless keep() was called, so that
// a run that is refused leaves nothing behind; a folder in which other files appeared stays.
class RunFolder {
 public:
  // Errors are those of prepare_run_folder(), RunLock and check_checkpoints_folder(). Waits a few
  // seconds for ranks whose launcher was killed.
  RunFolder(const std::string& path, RunRole role);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  void keep() { made_.folders.clear(); }
  const RunLock& lock() const { return *ranks_; }  // of a process that trains

 private:
  struct MadeFolders {
    ~MadeFolders();
    std::vector<std::string> folders;  // innermost first
  };

  std::string path_;
  MadeFolders made_;
  std::optional<RunLock> run_, ranks_;
};

// As check_run_folder(), for the folder of its checkpoints where there is one.
void check_checkpoints_folder(const std::string& run_folder);

// The checkpoint that a run starts from; nothing for a start from scratch. `resume` is "" (none may
// be there), "none", "latest", or the path of a run or of a checkpoint. Writes nothing. Logs
// rejected checkpoints, and newer ones than a chosen one. ConfigError where checkpoints are in the
// way.
std::optional<VerifiedCheckpoint> choose_checkpoint(const RunPaths& paths, CheckpointStore& store,
                                                    const std::string& resume, bool overwrite);

}  // namespace dstrain
