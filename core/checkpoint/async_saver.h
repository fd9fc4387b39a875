// Saving beside training. request() queues copies of the state into a snapshot and returns; one
// background thread waits for them and writes it. A crash in between equals no save. Without a
// snapshot, request() writes straight from the tensors and returns when that is done: the same
// calls, synchronous.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "core/checkpoint/store.h"

namespace dstrain {

struct SaveResult {
  int64_t step = 0;
  bool ok = false;
  std::string error;   // one sentence, if not ok
  double seconds = 0;  // writing, flushing, committing and retention
  int64_t bytes = 0;   // of tensors
  std::string path;    // of the checkpoint; empty after request_shard()
  ShardInfo shard;     // after request_shard() only
};

// All calls come from one thread, the owner's. At most one save is under way: request() waits for
// the one before. A save that fails is a result, no exception.
class AsyncSaver {
 public:
  // Copies tensors to host memory, tensor i to places[i], and joins halves. Returns what waits
  // until all is there, which the writing thread calls, or nothing where it is there already. The
  // default is memcpy; device memory needs its own (core/checkpoint/state_copy.h).
  using Arrival = std::function<void()>;
  using Copy =
      std::function<Arrival(std::span<const StateTensor> tensors, std::span<void* const> places)>;

  // Where the snapshot is; called by every request(), which waits for it.
  using Snapshot = std::function<std::span<std::byte>()>;

  // The store and the snapshot must outlive the saver; while busy() the store belongs to its
  // thread. Without a function, or with no bytes, there is no snapshot.
  AsyncSaver(CheckpointStore& store, Snapshot snapshot, Copy copy = {});
  AsyncSaver(CheckpointStore& store, std::span<std::byte> snapshot, Copy copy = {});
  ~AsyncSaver();  // waits for the save under way

  // Size that the snapshot needs for these tensors.
  static int64_t snapshot_bytes(std::span<const StateTensor> tensors);

  // A whole save by one process. The tensors may change as soon as this returns, unless the copy
  // goes on until its arrival: then whoever changes them on the device waits there.
  void request(const CheckpointMeta& meta, std::span<const StateTensor> tensors);
  // This rank's part of a save by several; the owner commits with the ranks' results.
  void request_shard(const SaveAttempt& attempt, int64_t rank,
                     std::span<const StateTensor> tensors);

  bool busy() const;
  void wait();                       // until no save is under way
  std::optional<SaveResult> poll();  // the oldest result not yet taken; does not wait

 private:
  using Job = std::function<void(std::span<const StateTensor>, SaveResult&)>;

  void start(int64_t step, std::span<const StateTensor> tensors, Job job);
  struct Copied {
    std::vector<StateTensor> state;
    Arrival arrival;
  };
  Copied take_snapshot(std::span<const StateTensor> tensors);
  void writer_loop();

  CheckpointStore& store_;
  Snapshot snapshot_;
  Copy copy_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::function<SaveResult()> pending_;  // set while a save waits for the thread or runs
  bool stopping_ = false;
  std::deque<SaveResult> results_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace dstrain
