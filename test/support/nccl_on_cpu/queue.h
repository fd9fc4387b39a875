// Streams of GPUs that are not there: each is a thread, which does its work in order, beside all
// others, now and then late. What no event orders runs in any order, at once.
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

// Thread-safe.
class Queue {
 public:
  Queue();
  // Waits for all work.
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  void push(std::function<void()> work);
  int64_t pushed();
  bool has_done(int64_t count);
  // Until so much of what was ever pushed is done. Not for the queue's own thread.
  void wait(int64_t count);
  void wait_for_all() { wait(pushed()); }
  // Of the first work that threw; "" if none did. Later work is not done.
  std::string failure();

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  int64_t pushed_ = 0, done_ = 0;
  bool ends_ = false;
  std::string failure_;
  std::thread thread_;
};

// A cudaStream_t is one of these. Events that were recorded on a stream may outlive it, and keep
// its queue.
struct StreamObject {
  std::shared_ptr<Queue> queue = std::make_shared<Queue>();
};
inline Queue& queue_of(cudaStream_t stream) {
  return *reinterpret_cast<StreamObject*>(stream)->queue;
}

// Memory that the runtime takes for a device's.
void add_device_memory(const void* begin, int64_t bytes);
void remove_device_memory(const void* begin);

}  // namespace nccl_on_cpu
