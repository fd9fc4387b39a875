#include "core/checkpoint/async_saver.h"

#include <chrono>
#include <cstring>
#include <exception>
#include <new>

#include "core/base/error.h"
#include "core/checkpoint/failpoint.h"

namespace dstrain {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kSnapshotAlignment = 64;

int64_t aligned(int64_t bytes) {
  return (bytes + kSnapshotAlignment - 1) / kSnapshotAlignment * kSnapshotAlignment;
}

AsyncSaver::Arrival copy_from_host(std::span<const StateTensor> tensors,
                                   std::span<void* const> places) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    DSTRAIN_CHECK(!tensors[i].low, "'" + tensors[i].name + "' is copied in two halves");
    const int64_t bytes = tensors[i].bytes();
    if (bytes > 0) std::memcpy(places[i], tensors[i].data, static_cast<size_t>(bytes));
  }
  return {};
}

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

AsyncSaver::AsyncSaver(CheckpointStore& store, Snapshot snapshot, Copy copy)
    : store_(store), snapshot_(std::move(snapshot)), copy_(std::move(copy)) {
  if (!copy_) copy_ = copy_from_host;
  if (snapshot_) thread_ = std::thread([this] { writer_loop(); });
}

AsyncSaver::AsyncSaver(CheckpointStore& store, std::span<std::byte> snapshot, Copy copy)
    : AsyncSaver(
          store, snapshot.empty() ? Snapshot() : [snapshot] { return snapshot; }, std::move(copy)) {
}

AsyncSaver::~AsyncSaver() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

int64_t AsyncSaver::snapshot_bytes(std::span<const StateTensor> tensors) {
  int64_t sum = 0;
  for (const StateTensor& tensor : tensors) sum += aligned(tensor.bytes());
  return sum;
}

void AsyncSaver::request(const CheckpointMeta& meta, std::span<const StateTensor> tensors) {
  start(meta.step, tensors, [this, meta](std::span<const StateTensor> state, SaveResult& result) {
    result.path = store_.save(meta, state);
  });
}

void AsyncSaver::request_shard(const SaveAttempt& attempt, int64_t rank,
                               std::span<const StateTensor> tensors) {
  start(attempt.step, tensors,
        [this, attempt, rank](std::span<const StateTensor> state, SaveResult& result) {
          result.shard = store_.write_shard(attempt, rank, state);
        });
}

void AsyncSaver::start(int64_t step, std::span<const StateTensor> tensors, Job job) {
  wait();
  const auto run = [step, job = std::move(job)](std::span<const StateTensor> state,
                                                const Arrival& arrival) {
    SaveResult result;
    result.step = step;
    Clock::time_point write_begin = Clock::now();
    try {
      if (arrival) arrival();
      write_begin = Clock::now();
      DSTRAIN_FAILPOINT("snapshot.before_write");
      for (const StateTensor& tensor : state) result.bytes += tensor.bytes();
      job(state, result);
      result.ok = true;
    } catch (const std::bad_alloc&) {
      result.error = "out of memory";
    } catch (const std::exception& error) {
      result.error = error.what();
    }
    result.seconds = seconds_since(write_begin);
    return result;
  };
  if (!snapshot_) {
    results_.push_back(run(tensors, {}));
  } else {
    DSTRAIN_FAILPOINT("snapshot.before_copy");
    Copied copied = take_snapshot(tensors);
    DSTRAIN_FAILPOINT("snapshot.after_copy");
    const std::lock_guard lock(mutex_);
    pending_ = [run, copied = std::move(copied)] { return run(copied.state, copied.arrival); };
    changed_.notify_all();
  }
}

AsyncSaver::Copied AsyncSaver::take_snapshot(std::span<const StateTensor> tensors) {
  const std::span<std::byte> snapshot = snapshot_();
  DSTRAIN_CHECK(snapshot_bytes(tensors) <= static_cast<int64_t>(snapshot.size()),
                "the snapshot buffer is smaller than the state");
  std::vector<StateTensor> copies(tensors.begin(), tensors.end());
  std::vector<void*> places;
  std::byte* at = snapshot.data();
  for (StateTensor& tensor : copies) {
    places.push_back(at);
    tensor.data = at;
    tensor.low = nullptr;
    at += aligned(tensor.bytes());
  }
  Arrival arrival = copy_(tensors, places);
  return {std::move(copies), std::move(arrival)};
}

bool AsyncSaver::busy() const {
  const std::lock_guard lock(mutex_);
  return static_cast<bool>(pending_);
}

void AsyncSaver::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !pending_; });
}

std::optional<SaveResult> AsyncSaver::poll() {
  const std::lock_guard lock(mutex_);
  if (results_.empty()) return std::nullopt;
  SaveResult result = std::move(results_.front());
  results_.pop_front();
  return result;
}

void AsyncSaver::writer_loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return pending_ || stopping_; });
    if (!pending_) return;
    lock.unlock();
    SaveResult result = pending_();  // only this thread clears it, and start() waits until then
    lock.lock();
    results_.push_back(std::move(result));
    pending_ = nullptr;
    changed_.notify_all();
  }
}

}  // namespace dstrain
