// The saves of a run: when the memory of the snapshot is taken, how the state comes there beside
// the next step, and what becomes of each save.
#pragma once

#include <cstdint>
#include <future>
#include <span>
#include <string>

#include "apps/rank_saves.h"
#include "core/checkpoint/async_saver.h"
#include "core/checkpoint/state_copy.h"
#include "core/config/config.h"
#include "core/engine/train_engine.h"
#include "core/metrics/sink.h"

namespace dstrain {

// Every rank makes the same calls at the same steps.
class RunSaves {
 public:
  // All outlive this, and the engine's memory is there. Where the run is going to save, a thread
  // begins to take the snapshot's memory: a GPU's driver takes seconds to pin so much, beside all
  // that comes before the first save.
  RunSaves(const Config& config, Communicator& world, Backend& backend, TrainEngine& engine,
           CheckpointStore& store, MetricsHub& hub);

  // Throws what taking the snapshot's memory threw, once that has ended; does not wait for it.
  void check_memory();
  // The state that the steps so far leave; with checkpoint.async, it is written beside the next.
  void request(const CheckpointMeta& meta);
  // Tells the hub how saves ended. StorageError once checkpoint.max_failed_saves in a row failed.
  void report();
  void wait_and_report();  // for the save under way

  // Whether the step is saved, or about to be. False again when report() has met its failure.
  bool has(int64_t step) const { return step == saved_step_; }
  // The path of the newest checkpoint that was reported; empty if none was.
  const std::string& newest() const { return newest_; }
  // That training stood still for saves, since the last call.
  double take_stall_seconds();

 private:
  AsyncSaver::Snapshot snapshot_source();
  void order_snapshot();
  std::span<std::byte> snapshot();
  AsyncSaver::Arrival copy_state(std::span<const StateTensor> tensors,
                                 std::span<void* const> places);

  const CheckpointConfig config_;
  Backend& backend_;
  TrainEngine& engine_;
  MetricsHub& hub_;
  DeviceMemory snapshot_memory_;
  std::future<DeviceMemory> coming_snapshot_;
  StateCopy state_copy_;
  AsyncSaver saver_;
  RankSaves saves_;

  int64_t saved_step_ = -1, failed_in_a_row_ = 0;
  std::string newest_;
  double stall_seconds_ = 0, newest_stall_seconds_ = 0;  // not taken yet; of the save under way
};

}  // namespace dstrain
