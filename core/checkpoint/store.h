// A folder of checkpoints. A save is all or nothing:
//   1. files are written into step-00001200.tmp-<uuid>, flushed and closed;
//   2. manifest.json follows, flushed, then the folder: from here on the checkpoint is complete;
//   3. the folder is renamed to step-00001200, and the folder above it is flushed.
// An error at any point removes the attempt; the next save starts with new files. Reading trusts
// nothing but a manifest that fits its files.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "core/checkpoint/manifest.h"
#include "core/checkpoint/run_lock.h"
#include "core/checkpoint/verify.h"

namespace dstrain {

// The box [offset, offset + extent) of a global tensor: what one rank holds, contiguous, row-major.
struct StateTensor {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> global_shape;
  std::vector<int64_t> offset, extent;  // per dim
  // Host memory once it is saved; device memory where a snapshot is taken first.
  const void* data = nullptr;
  // f32 in two halves (core/base/bf16.h): `data` holds the bf16 ones, `low` the u16 rest. A
  // snapshot joins them.
  const void* low = nullptr;

  int64_t bytes() const;
};

// A save under way; plain values, so that rank 0 can send it to the others.
struct SaveAttempt {
  int64_t step = 0;
  std::string folder;
};

struct StoredCheckpoint {
  int64_t step = 0;
  std::string path;
};

struct StoreListing {
  std::vector<StoredCheckpoint> checkpoints;  // by name only, newest first
  std::vector<std::string> leftovers;         // paths of saves or removals that did not end
  std::vector<std::string> unknown;           // paths of anything else
};

struct VerifiedCheckpoint {
  std::string path;
  Manifest manifest;
};

struct RetentionReport {
  std::vector<std::string> removed, left;  // left: would have gone, but holds what is not ours
};

// One thread at a time. Errors are StorageError, PermissionError or NotFoundError with the path and
// the reason, unless stated.
class CheckpointStore {
 public:
  // The folder is created by the first save. `keep` checkpoints stay, and always the newest two
  // that verify.
  CheckpointStore(std::string folder, int64_t keep);

  const std::string& folder() const { return folder_; }
  StoreListing list() const;

  // The newest checkpoint that verifies down to its bytes; nothing if there is none at all. Calls
  // on_rejected with one line for each newer one. DataError with those lines if none verifies.
  std::optional<VerifiedCheckpoint> latest(
      const std::function<void(const std::string&)>& on_rejected);

  // Saves a state that this process holds entirely, applies retention and returns the new path.
  // A failure to remove old checkpoints is only logged.
  std::string save(const CheckpointMeta& meta, std::span<const StateTensor> tensors);

  // The same in parts. Rank 0 begins, all ranks write one shard each, rank 0 commits with
  // everybody's ShardInfo, then applies retention. When any part fails, rank 0 abandons.
  SaveAttempt begin(int64_t step);
  ShardInfo write_shard(const SaveAttempt& attempt, int64_t rank,
                        std::span<const StateTensor> tensors) const;
  // DataError if the shards do not cover every tensor exactly once.
  std::string commit(const SaveAttempt& attempt, std::span<const ShardInfo> shards,
                     const CheckpointMeta& meta);
  void abandon(const SaveAttempt& attempt) noexcept;

  RetentionReport apply_retention();
  // Removes what dead processes left. The lock proves that no save is under way.
  std::vector<std::string> remove_leftovers(const RunLock& lock);
  // Deletes every checkpoint: the user asked for a new start. StorageError, and nothing goes, if
  // one of them holds files that are not ours.
  void remove_all(const RunLock& lock);

 private:
  bool is_verified(const std::string& path);
  void retire(const StoredCheckpoint& checkpoint);

  std::string folder_;
  int64_t keep_;
  std::set<std::string> verified_;  // written or read entirely by this object
};

}  // namespace dstrain
