// Streams of GPUs that are not there: each is a thread, which does its work in order, beside all
// others, now and then late. What no event orders runs in any order, at once.
//
// A GPU hands out work from a few hardware queues that streams share. Work whose stream is busy, or
// that waits for an event, then also holds up what streams behind it could do. The worst is one
// queue for all streams of a GPU (CUDA_DEVICE_MAX_CONNECTIONS=1), which tests can have.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace nccl_on_cpu {

class HardwareQueue;

// Streams that are made from now on share one hardware queue with the others of their device.
void share_hardware_queues(bool share);

// Of a stream. Thread-safe.
class Queue {
 public:
  explicit Queue(std::shared_ptr<HardwareQueue> hardware);
  // Waits for all work.
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  void push(std::function<void()> work);
  // Work pushed from now on is done after so much of the other's.
  void push_wait(const std::shared_ptr<Queue>& other, int64_t count);
  int64_t pushed();
  bool has_done(int64_t count);
  // Until so much of what was ever pushed is done. Not for the queue's own thread.
  void wait(int64_t count);
  void wait_for_all() { wait(pushed()); }
  // Of the first work that threw; "" if none did. Later work is not done.
  std::string failure();

 private:
  friend class HardwareQueue;
  void hand_over(std::function<void()> work);
  void wait_until_idle();
  void count_as_done();
  void run();

  const std::shared_ptr<HardwareQueue> hardware_;  // null: its own
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  int64_t pushed_ = 0, handed_over_ = 0, done_ = 0;
  bool ends_ = false;
  std::string failure_;
  std::thread thread_;
};

// Of the device, or none where each stream has its own.
std::shared_ptr<HardwareQueue> hardware_queue_of(int device);

// A cudaStream_t is one of these. Events that were recorded on a stream may outlive it, and keep
// its queue.
struct StreamObject {
  explicit StreamObject(int device) : queue(std::make_shared<Queue>(hardware_queue_of(device))) {}
  std::shared_ptr<Queue> queue;
};
inline Queue& queue_of(cudaStream_t stream) {
  return *reinterpret_cast<StreamObject*>(stream)->queue;
}

// Memory that the runtime takes for a device's.
void add_device_memory(const void* begin, int64_t bytes);
void remove_device_memory(const void* begin);

}  // namespace nccl_on_cpu
