#include "test/support/cuda_on_cpu/streams.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "test/support/cuda_on_cpu/runtime.h"

namespace cuda_on_cpu {
namespace {

using Clock = std::chrono::steady_clock;

struct Queue {
  std::deque<std::function<void()>> work;
  int64_t queued = 0, done = 0;
  std::vector<void*> pieces;  // of scratch, of the operation that is being queued
};

// Behind so much work of a queue.
struct Point {
  Queue* queue = nullptr;
  int64_t at = 0;
};

// A record that a queue has come to. Shared, because its event may be recorded anew, or be
// destroyed, before that.
struct Record {
  Point point;
  Clock::time_point time;
};
struct RecordedEvent {
  std::shared_ptr<Record> last;
};

struct Freed {
  void* memory;
  std::vector<Point> users;
};

class Streams {
 public:
  Queue& make_queue() { return *queues_.emplace_back(std::make_unique<Queue>()); }

  // Work that waits for other queues runs them up to there.
  void run(Point point) {
    while (point.queue->done < point.at) {
      const std::function<void()> work = std::move(point.queue->work.front());
      point.queue->work.pop_front();
      ++point.queue->done;
      work();
    }
  }
  void host_waits_for(Point point) {
    const size_t others = order_ == Order::late ? 0 : queues_.size();
    for (size_t i = 0; i < others; ++i) {
      Queue* const other = queues_[order_ == Order::oldest_first ? i : others - 1 - i].get();
      if (other != point.queue) run({other, other->queued});
    }
    run(point);
    std::erase_if(freed_, [](const Freed& freed) { return free_if_unused(freed); });
  }
  void free_when_unused(void* memory) {
    Freed freed{memory, {}};
    for (const auto& one : queues_)
      if (one->done < one->queued) freed.users.push_back({one.get(), one->queued});
    if (!free_if_unused(freed)) freed_.push_back(std::move(freed));
  }

  void set_order(Order order) { order_ = order; }

 private:
  static bool free_if_unused(const Freed& freed) {
    for (const Point& user : freed.users)
      if (user.queue->done < user.at) return false;
    free_memory(freed.memory);
    return true;
  }

  std::vector<std::unique_ptr<Queue>> queues_;  // those destroyed, too: events point at them
  std::vector<Freed> freed_;
  Order order_ = Order::late;
};

// Of a host thread.
struct Waits {
  std::set<int64_t> left_out;
  int64_t made = 0;
};
thread_local Waits waits;

Streams& streams() {
  static Streams all;
  return all;
}
Queue& queue_of(cudaStream_t stream) {
  return *reinterpret_cast<Queue*>(stream);
}
RecordedEvent& event_of(cudaEvent_t event) {
  return *reinterpret_cast<RecordedEvent*>(event);
}
Point end_of(cudaStream_t stream) {
  return {&queue_of(stream), queue_of(stream).queued};
}

void add(Queue& to, std::function<void()> work) {
  to.work.push_back(std::move(work));
  ++to.queued;
}

}  // namespace

std::recursive_mutex& device_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

void set_order(Order order) {
  const std::lock_guard lock(device_mutex());
  streams().set_order(order);
}

void queue(cudaStream_t stream, std::function<void()> work) {
  const std::lock_guard lock(device_mutex());
  if (stream)
    add(queue_of(stream), std::move(work));
  else
    work();
}

void wait_for(cudaStream_t stream) {
  const std::lock_guard lock(device_mutex());
  if (stream) streams().host_waits_for(end_of(stream));
}
void free_when_unused(void* memory) {
  const std::lock_guard lock(device_mutex());
  streams().free_when_unused(memory);
}

void leave_out_waits(std::set<int64_t> numbers) {
  waits = {std::move(numbers), 0};
}
int64_t waits_made() {
  return waits.made;
}

void* scratch_piece(cudaStream_t stream, bool first_of_operation, size_t bytes,
                    const void* contents, size_t contents_bytes) {
  const std::lock_guard lock(device_mutex());
  Queue& to = queue_of(stream);
  if (first_of_operation)
    add(to, [old = std::exchange(to.pieces, {})] {
      for (void* piece : old) free_memory(piece);
    });
  void* const piece = allocate_memory(bytes);
  to.pieces.push_back(piece);
  if (const size_t known = std::min(bytes, contents_bytes))
    add(to, [=] { std::memcpy(piece, contents, known); });
  return piece;
}

}  // namespace cuda_on_cpu

// --- the runtime's functions for streams and events

using namespace cuda_on_cpu;

extern "C" {

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return device_state();
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  const std::lock_guard lock(device_mutex());
  *stream = reinterpret_cast<cudaStream_t>(&streams().make_queue());
  return device_state();
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard lock(device_mutex());
  streams().host_waits_for(end_of(stream));
  for (void* piece : std::exchange(queue_of(stream).pieces, {})) free_memory(piece);
  return device_state();
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  wait_for(stream);
  return device_state();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::lock_guard lock(device_mutex());
  if (!waits.left_out.contains(waits.made++) && event_of(event).last)
    add(queue_of(stream), [point = event_of(event).last->point] { streams().run(point); });
  return device_state();
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new RecordedEvent);
  return device_state();
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &event_of(event);
  return device_state();
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(device_mutex());
  auto record = std::make_shared<Record>();
  add(queue_of(stream), [record] { record->time = Clock::now(); });
  record->point = end_of(stream);
  event_of(event).last = std::move(record);
  return device_state();
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const std::lock_guard lock(device_mutex());
  if (event_of(event).last) streams().host_waits_for(event_of(event).last->point);
  return device_state();
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  const std::lock_guard lock(device_mutex());
  *ms = std::chrono::duration<float, std::milli>(event_of(end).last->time -
                                                 event_of(begin).last->time)
            .count();
  return device_state();
}

}  // extern "C"
