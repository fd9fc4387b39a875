#include "test/support/nccl_on_cpu/queue.h"

#include <chrono>
#include <exception>
#include <map>
#include <random>
#include <utility>

namespace nccl_on_cpu {
namespace {

// One of so many pieces of work begins late.
constexpr unsigned kLate = 64;
constexpr std::chrono::microseconds kDelay{200};

}  // namespace

// Conditions are notified under their lock: whoever is woken may destroy them.

// What a GPU hands out in the order of calls, whatever their streams.
class HardwareQueue {
 public:
  HardwareQueue() : thread_([this] { run(); }) {}
  ~HardwareQueue() {
    push({});
    thread_.join();
  }
  HardwareQueue(const HardwareQueue&) = delete;
  HardwareQueue& operator=(const HardwareQueue&) = delete;

  struct Entry {
    Queue* stream = nullptr;  // null: the end
    std::function<void()> work;
    bool is_wait = false;  // which nothing passes
  };
  void push(Entry entry) {
    {
      const std::lock_guard lock(mutex_);
      entries_.push_back(std::move(entry));
      changed_.notify_all();
    }
  }

 private:
  void run() {
    for (;;) {
      Entry entry = next();
      if (!entry.stream) return;
      entry.stream->wait_until_idle();
      if (entry.is_wait) {
        entry.work();
        entry.work = nullptr;  // may be the last to hold another stream
        entry.stream->count_as_done();
      } else {
        entry.stream->hand_over(std::move(entry.work));
      }
    }
  }
  Entry next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !entries_.empty(); });
    Entry entry = std::move(entries_.front());
    entries_.pop_front();
    return entry;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Entry> entries_;
  std::thread thread_;
};

namespace {

struct Hardware {
  std::mutex mutex;
  bool is_shared = false;
  std::map<int, std::weak_ptr<HardwareQueue>> queues;  // by device
};
Hardware& hardware() {
  static Hardware all;
  return all;
}

}  // namespace

void share_hardware_queues(bool share) {
  const std::lock_guard lock(hardware().mutex);
  hardware().is_shared = share;
}

std::shared_ptr<HardwareQueue> hardware_queue_of(int device) {
  const std::lock_guard lock(hardware().mutex);
  if (!hardware().is_shared) return nullptr;
  std::weak_ptr<HardwareQueue>& of_device = hardware().queues[device];
  std::shared_ptr<HardwareQueue> queue = of_device.lock();
  if (!queue) of_device = queue = std::make_shared<HardwareQueue>();
  return queue;
}

Queue::Queue(std::shared_ptr<HardwareQueue> hardware)
    : hardware_(std::move(hardware)), thread_([this] { run(); }) {}

Queue::~Queue() {
  wait_for_all();
  {
    const std::lock_guard lock(mutex_);
    ends_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

void Queue::push(std::function<void()> work) {
  {
    const std::lock_guard lock(mutex_);
    ++pushed_;
  }
  if (hardware_)
    hardware_->push({this, std::move(work)});
  else
    hand_over(std::move(work));
}

void Queue::push_wait(const std::shared_ptr<Queue>& other, int64_t count) {
  const auto wait = [other, count] { other->wait(count); };
  if (!hardware_) return push(wait);
  {
    const std::lock_guard lock(mutex_);
    ++pushed_;
  }
  hardware_->push({this, wait, /*is_wait=*/true});
}

void Queue::hand_over(std::function<void()> work) {
  {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    ++handed_over_;
    changed_.notify_all();
  }
}

void Queue::wait_until_idle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_ == handed_over_; });
}

void Queue::count_as_done() {
  {
    const std::lock_guard lock(mutex_);
    ++handed_over_;
    ++done_;
    changed_.notify_all();
  }
}

int64_t Queue::pushed() {
  const std::lock_guard lock(mutex_);
  return pushed_;
}

bool Queue::has_done(int64_t count) {
  const std::lock_guard lock(mutex_);
  return done_ >= count;
}

void Queue::wait(int64_t count) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_ >= count; });
}

std::string Queue::failure() {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void Queue::run() {
  std::minstd_rand random(std::random_device{}());
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return !work_.empty() || ends_; });
    if (work_.empty()) return;
    std::function<void()> work = std::move(work_.front());
    work_.pop_front();
    const bool goes_on = failure_.empty();
    lock.unlock();
    if (random() % kLate == 0) std::this_thread::sleep_for(kDelay);
    std::string failure;
    try {
      if (goes_on) work();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    work = nullptr;  // may be the last to hold another queue
    lock.lock();
    if (!failure.empty()) failure_ = failure;
    ++done_;
    changed_.notify_all();
  }
}

}  // namespace nccl_on_cpu
