// A table in shared memory in which the ranks of one host say where they are. The launcher reads
// it: whether the ranks have come far enough to be sent signals, and what each was doing when a job
// ended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "parallel/rank_progress.h"

namespace dstrain {

class RankBoard {
 public:
  // A new file of `ranks` empty slots. StorageError or PermissionError if it cannot be made.
  static RankBoard create(const std::string& path, int64_t ranks);
  // None if there is no such file, as on other hosts than the launcher's, or it is no board.
  static std::optional<RankBoard> open(const std::string& path);

  RankBoard(RankBoard&& other) noexcept;
  RankBoard& operator=(RankBoard&& other) noexcept;
  ~RankBoard();

  // By local rank. Valid until this is destroyed; the file may be gone before.
  std::span<RankSlot> slots() const { return slots_; }
  // Of the ranks that have come.
  std::vector<RankState> states() const;

 private:
  explicit RankBoard(std::span<RankSlot> slots) : slots_(slots) {}

  std::span<RankSlot> slots_;
};

// The folder of one launch for files that live no longer than it: the board, and Open MPI's session
// and shared-memory files, which Open MPI itself leaves behind when it is killed.
class SessionFolder {
 public:
  // Removes what launches that were killed have left in any of the folders, and makes one below the
  // first that has `bytes` free, else below the last. StorageError or PermissionError.
  SessionFolder(int64_t bytes, const std::vector<std::string>& bases);
  ~SessionFolder();
  SessionFolder(const SessionFolder&) = delete;
  SessionFolder& operator=(const SessionFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_ = -1;  // holds a lock, which says that the folder is in use
};

}  // namespace dstrain
