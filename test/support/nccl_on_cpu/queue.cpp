#include "test/support/nccl_on_cpu/queue.h"

#include <chrono>
#include <exception>
#include <random>
#include <utility>

namespace nccl_on_cpu {
namespace {

// One of so many pieces of work begins late.
constexpr unsigned kLate = 64;
constexpr std::chrono::microseconds kDelay{200};

}  // namespace

Queue::Queue() : thread_([this] { run(); }) {}

Queue::~Queue() {
  {
    const std::lock_guard lock(mutex_);
    ends_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Queue::push(std::function<void()> work) {
  {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    ++pushed_;
  }
  changed_.notify_all();
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
