#include "apps/run_saves.h"

#include <fmt/format.h>

#include <chrono>
#include <optional>
#include <utility>

#include "apps/assemble.h"
#include "core/base/error.h"
#include "core/base/format_units.h"

namespace dstrain {

RunSaves::RunSaves(const Config& config, Communicator& world, Backend& backend, TrainEngine& engine,
                   CheckpointStore& store, MetricsHub& hub)
    : config_(config.checkpoint),
      backend_(backend),
      engine_(engine),
      hub_(hub),
      state_copy_(backend, engine.copy_chunks_2N()),
      saver_(store, snapshot_source(),
             [this](std::span<const StateTensor> tensors, std::span<void* const> places) {
               return copy_state(tensors, places);
             }),
      saves_(world, store, saver_) {
  if (!snapshot_source()) return;
  const bool saves_in_steps = config_.every > 0 && config_.every <= config.train.steps;
  if (config_.at_end || saves_in_steps) order_snapshot();
  if (backend_.is_cpu()) snapshot();
}

// What lies on a device is written from a snapshot in any case. Where only a signal can ask for a
// save, a GPU's job takes the snapshot's memory then.
AsyncSaver::Snapshot RunSaves::snapshot_source() {
  if (backend_.is_cpu() && !config_.async) return {};
  return [this] { return snapshot(); };
}

void RunSaves::order_snapshot() {
  const int64_t bytes = AsyncSaver::snapshot_bytes(state_tensors(engine_));
  coming_snapshot_ = std::async(std::launch::async, [&backend = backend_, bytes] {
    return DeviceMemory(backend, bytes, MemoryKind::host);
  });
}

void RunSaves::check_memory() {
  if (coming_snapshot_.valid() &&
      coming_snapshot_.wait_for(std::chrono::seconds(0)) == std::future_status::ready)
    snapshot();
}

// Waits for its memory, and throws what its allocation threw.
std::span<std::byte> RunSaves::snapshot() {
  if (!snapshot_memory_.data()) {
    if (!coming_snapshot_.valid()) order_snapshot();
    snapshot_memory_ = coming_snapshot_.get();
  }
  return {static_cast<std::byte*>(snapshot_memory_.data()),
          static_cast<size_t>(snapshot_memory_.bytes())};
}

// Beside the next step, which waits on the device before it changes what is copied.
AsyncSaver::Arrival RunSaves::copy_state(std::span<const StateTensor> tensors,
                                         std::span<void* const> places) {
  engine_.begin_state_copy(state_copy_.stream());
  Event& copied = state_copy_.queue(tensors, places);
  engine_.hold_state(copied);
  return [&copied] { copied.synchronize(); };
}

void RunSaves::request(const CheckpointMeta& meta) {
  const auto begin = std::chrono::steady_clock::now();
  wait_and_report();  // the save before, with what training waited for that one
  saves_.request(meta, state_tensors(engine_));
  if (!config_.async) saves_.wait();
  const std::chrono::duration<double> stall = std::chrono::steady_clock::now() - begin;
  newest_stall_seconds_ = stall.count();
  stall_seconds_ += newest_stall_seconds_;
  saved_step_ = meta.step;
}

void RunSaves::report() {
  while (const std::optional<SaveResult> result = saves_.poll()) {
    hub_.on_checkpoint({.step = result->step,
                        .seconds = result->seconds,
                        .bytes = result->bytes,
                        .ok = result->ok,
                        .stall_ms = 1e3 * newest_stall_seconds_,
                        .error = result->error});
    if (result->ok) {
      failed_in_a_row_ = 0;
      newest_ = result->path;
      continue;
    }
    ++failed_in_a_row_;
    if (saved_step_ == result->step) saved_step_ = -1;
    if (failed_in_a_row_ >= config_.max_failed_saves)
      throw StorageError(fmt::format("{} in a row failed, the last one at step {}: {}",
                                     format_plural(failed_in_a_row_, "save"), result->step,
                                     result->error));
  }
}

void RunSaves::wait_and_report() {
  saves_.wait();
  report();
}

double RunSaves::take_stall_seconds() { return std::exchange(stall_seconds_, 0.0); }

}  // namespace dstrain
