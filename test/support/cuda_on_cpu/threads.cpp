#include "test/support/cuda_on_cpu/threads.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <iostream>
#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "test/support/cuda_on_cpu/streams.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024, kMostBlocksYZ = 65535;
constexpr size_t kSharedUnasked = size_t{48} << 10;
constexpr int kUnwritten = 0xff;  // bytes of a NaN

// A stack and where its function goes on.
struct Fiber {
  std::unique_ptr<std::byte[]> stack;  // none: the process's own
  void* place[5];                      // of __builtin_setjmp
  bool begun = false;
  const void* bottom = nullptr;
  size_t bytes = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, bytes_cleared;
};

enum class State { ready, at_barrier, in_warp, ended };

struct Thread {
  uint3 index;
  unsigned lane = 0, first_of_warp = 0;
  State state = State::ready;
  Fiber* fiber = nullptr;  // null before it begins

  // Of the warp's function that it is in.
  const char* function = nullptr;
  unsigned mask = 0, present = 0;
  const void* value = nullptr;
  void* values = nullptr;
  size_t bytes = 0;

  std::deque<std::vector<Copy>> copies;  // by group, the oldest first
  std::vector<Copy> open_group;
};

class Device {
 public:
  void allow_shared_memory(const void* kernel, size_t bytes) { shared_memory_of_[kernel] = bytes; }
  bool may_launch(const Launch& launch, const void* kernel) const;
  void launch(const Launch& launch, const std::function<void()>& thread);

  [[noreturn]] void fail(std::string why);
  void wait_for_block();
  unsigned meet(const char* function, unsigned mask, const void* value, void* values, size_t bytes);
  void* dynamic_shared_memory() { return dynamic_shared_.get(); }
  void enter_shared(void* memory, size_t bytes);
  Thread& thread() { return *thread_; }

 private:
  void run_block();
  static void run_fiber();
  void run_threads();
  Thread* draw();
  void switch_to(Fiber& to);
  void go_on();
  void wake(Thread& thread);
  void end_thread();
  void open_barrier_if_all_wait();
  void finish_if_all_met(const Thread& one);
  unsigned lanes_of(const Thread& thread) const;

  std::unordered_map<const void*, size_t> shared_memory_of_;  // of kernels that asked for more

  const std::function<void()>* kernel_ = nullptr;  // what a thread does
  std::minstd_rand order_;
  unsigned launches_ = 0;

  std::vector<Thread> threads_;  // of the block
  std::vector<Thread*> ready_;
  size_t alive_ = 0, at_barrier_ = 0;
  Thread* thread_ = nullptr;  // the one that runs
  std::unique_ptr<std::byte[]> dynamic_shared_;
  size_t dynamic_bytes_ = 0;
  std::vector<void*> entered_;  // static shared memory that the block has seen

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  Fiber host_;  // of the operating system's thread that waits for the launch
  Fiber* running_ = &host_;
  Fiber* left_ = nullptr;  // for running_
  bool failed_ = false;
  std::exception_ptr exception_;
};

Device& device() {
  static Device one;
  return one;
}

// --- stacks

// The compiler's own functions and not the library's, with which AddressSanitizer would take all
// frames of the stack for left.
[[gnu::noinline, gnu::no_sanitize("address")]] void Device::switch_to(Fiber& to) {
  Fiber* const from = running_;
  if (from == &to) return;
  running_ = &to;
  left_ = from;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.bytes);
#endif
  if (__builtin_setjmp(from->place) == 0) {
    if (to.begun || !to.stack) __builtin_longjmp(to.place, 1);
    to.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = to.stack.get();
    context.uc_stack.ss_size = to.bytes;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &left_->bottom, &left_->bytes);
#endif
}

void Device::run_fiber() {
#ifdef __SANITIZE_ADDRESS__
  Fiber& left = *device().left_;
  __sanitizer_finish_switch_fiber(nullptr, &left.bottom, &left.bytes);
#endif
  device().run_threads();
}

// A fiber takes thread after thread until one waits. Others then go on on theirs.
void Device::run_threads() {
  Fiber* const own = running_;
  for (;;) {
    try {
      (*kernel_)();
    } catch (...) {
      exception_ = std::current_exception();
      switch_to(host_);
    }
    end_thread();
    Thread* const next = draw();
    if (next && !next->fiber) {
      next->fiber = own;
      continue;
    }
    idle_.push_back(own);
    switch_to(next ? *next->fiber : host_);
  }
}

// Of the threads that can run, one of those that were woken last: these are a warp's, mostly, whose
// stacks the caches still hold. A warp so gets far ahead of others.
Thread* Device::draw() {
  if (ready_.empty()) {
    if (alive_ == 0) return nullptr;
    fail(std::to_string(at_barrier_) + " threads wait at a barrier, and " +
         std::to_string(alive_ - at_barrier_) + " for lanes of their warp: none can go on");
  }
  const size_t recent = std::min<size_t>(ready_.size(), kWarp);
  std::swap(ready_[ready_.size() - 1 - order_() % recent], ready_.back());
  thread_ = ready_.back();
  ready_.pop_back();
  threadIdx = thread_->index;
  return thread_;
}

// Another thread runs, until the calling one is drawn.
void Device::go_on() {
  Thread* const own = thread_;
  Thread* const next = draw();
  if (!next->fiber) {
    if (idle_.empty()) {
      Fiber& fiber = *fibers_.emplace_back(std::make_unique<Fiber>());
      fiber.stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
      fiber.bottom = fiber.stack.get();
      // Ends that were a power of two apart would share a few lines of the caches.
      fiber.bytes = kStackBytes - fibers_.size() % 64 * 64 * 7;
      idle_.push_back(&fiber);
    }
    next->fiber = idle_.back();
    idle_.pop_back();
  }
  switch_to(*next->fiber);
  thread_ = own;
}

// --- blocks

bool Device::may_launch(const Launch& launch, const void* kernel) const {
  const auto allowed = shared_memory_of_.find(kernel);
  const size_t shared = allowed == shared_memory_of_.end() ? kSharedUnasked : allowed->second;
  const dim3 grid = launch.grid, block = launch.block;
  const size_t size = size_t{block.x} * block.y * block.z;
  return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff &&
         grid.y <= kMostBlocksYZ && grid.z <= kMostBlocksYZ && size > 0 && size <= kMostThreads &&
         block.z <= 64 && launch.shared_bytes <= shared;
}

void Device::launch(const Launch& launch, const std::function<void()>& thread) {
  if (launch_error() == cudaErrorLaunchFailure) return;
  const dim3 grid = launch.grid;
  kernel_ = &thread;
  order_.seed(++launches_);
  gridDim = grid;
  blockDim = launch.block;
  dynamic_bytes_ = launch.shared_bytes;
  dynamic_shared_ = std::make_unique_for_overwrite<std::byte[]>(dynamic_bytes_);
  std::vector<int64_t> blocks(size_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int64_t>(i);
  std::shuffle(blocks.begin(), blocks.end(), order_);
  for (const int64_t at : blocks) {
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    run_block();
    if (failed_ || exception_) break;
  }
  if (!failed_ && !exception_) return;
  fibers_.clear();  // with the threads that were in the middle of something
  idle_.clear();
  if (std::exchange(failed_, false)) launch_error() = cudaErrorLaunchFailure;
  if (exception_) std::rethrow_exception(std::exchange(exception_, nullptr));
}

void Device::run_block() {
  std::memset(dynamic_shared_.get(), kUnwritten, dynamic_bytes_);
  entered_.clear();
  const unsigned size = blockDim.x * blockDim.y * blockDim.z;
  threads_.resize(size);
  ready_.clear();
  for (unsigned i = 0; i < size; ++i) {
    Thread& thread = threads_[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.lane = i % kWarp;
    thread.first_of_warp = i - i % kWarp;
    thread.fiber = nullptr;
    thread.copies.clear();
    thread.open_group.clear();
    wake(thread);
  }
  std::shuffle(ready_.begin(), ready_.end(), order_);
  alive_ = size;
  at_barrier_ = 0;
  go_on();
}

void Device::wake(Thread& thread) {
  thread.state = State::ready;
  ready_.push_back(&thread);
}

void Device::end_thread() {
  Thread& own = *thread_;
  own.state = State::ended;
  --alive_;
  open_barrier_if_all_wait();
  for (unsigned i = own.first_of_warp, end = i + lanes_of(own); i < end; ++i)
    if (threads_[i].state == State::in_warp) finish_if_all_met(threads_[i]);
}

void Device::wait_for_block() {
  thread_->state = State::at_barrier;
  ++at_barrier_;
  open_barrier_if_all_wait();
  go_on();
}

void Device::open_barrier_if_all_wait() {
  if (at_barrier_ < alive_) return;
  at_barrier_ = 0;
  for (Thread& thread : threads_)
    if (thread.state == State::at_barrier) wake(thread);
  std::shuffle(ready_.begin(), ready_.end(), order_);
}

void Device::fail(std::string why) {
  const auto text = [](const uint3& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
           ")";
  };
  std::cerr << "a kernel on the CPU failed in thread " << text(threadIdx) << " of block "
            << text(blockIdx) << ": " << why << std::endl;
  std::string().swap(why);  // nothing destroys what this stack holds
  failed_ = true;
  switch_to(host_);
  std::terminate();  // it does not come back
}

void Device::enter_shared(void* memory, size_t bytes) {
  if (std::find(entered_.begin(), entered_.end(), memory) != entered_.end()) return;
  entered_.push_back(memory);
  std::memset(memory, kUnwritten, bytes);
}

// --- warps

unsigned Device::lanes_of(const Thread& thread) const {
  return std::min<unsigned>(kWarp, static_cast<unsigned>(threads_.size()) - thread.first_of_warp);
}

unsigned Device::meet(const char* function, unsigned mask, const void* value, void* values,
                      size_t bytes) {
  Thread& own = *thread_;
  if (!(mask >> own.lane & 1)) fail(std::string(function) + ": the lane is not in its own mask");
  own.state = State::in_warp;
  own.function = function;
  own.mask = mask;
  own.value = value;
  own.values = values;
  own.bytes = bytes;
  finish_if_all_met(own);
  go_on();
  return own.present;
}

// Of the lanes that `one` waits for.
void Device::finish_if_all_met(const Thread& one) {
  const unsigned mask = one.mask, lanes = lanes_of(one);
  Thread* const warp = &threads_[one.first_of_warp];
  unsigned present = 0;
  for (unsigned i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1) || warp[i].state == State::ended) continue;
    if (warp[i].state != State::in_warp) return;
    if (warp[i].mask != mask ||
        (warp[i].function != one.function && std::strcmp(warp[i].function, one.function) != 0))
      fail(std::string("lanes of a warp wait for each other in ") + one.function + " and in " +
           warp[i].function + ", or with different masks");
    present |= 1u << i;
  }
  const size_t bytes = one.bytes;
  std::byte gathered[kWarp * 64];
  if (bytes > 64) fail("a lane's value is larger than is provided for");
  std::memset(gathered, kUnwritten, kWarp * bytes);
  for (unsigned i = 0; i < lanes; ++i)
    if (present >> i & 1) std::memcpy(gathered + i * bytes, warp[i].value, bytes);
  for (unsigned i = 0; i < lanes; ++i) {
    if (!(present >> i & 1)) continue;
    std::memcpy(warp[i].values, gathered, kWarp * bytes);
    warp[i].present = present;
    wake(warp[i]);
  }
}

}  // namespace

void Launch::queue_kernel(const void* kernel, std::function<void()> thread) const {
  const std::lock_guard lock(device_mutex());
  if (device().may_launch(*this, kernel))
    queue(stream,
          [launch = *this, thread = std::move(thread)] { device().launch(launch, thread); });
  else if (launch_error() != cudaErrorLaunchFailure)
    launch_error() = cudaErrorInvalidConfiguration;
}

void allow_shared_memory(const void* kernel, size_t bytes) {
  const std::lock_guard lock(device_mutex());
  device().allow_shared_memory(kernel, bytes);
}

cudaError_t& launch_error() {
  static cudaError_t error = cudaSuccess;
  return error;
}

void fail(std::string why) {
  device().fail(std::move(why));
}
void wait_for_block() {
  device().wait_for_block();
}
void* dynamic_shared_memory() {
  return device().dynamic_shared_memory();
}
void enter_shared_memory(void* memory, size_t bytes) {
  device().enter_shared(memory, bytes);
}
unsigned meet(const char* function, unsigned mask, const void* value, void* values_of_32,
              size_t bytes) {
  return device().meet(function, mask, value, values_of_32, bytes);
}
int lane() {
  return static_cast<int>(device().thread().lane);
}

void begin_copy(void* to, const void* from, size_t bytes, size_t bytes_cleared) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("an asynchronous copy is not aligned to 16 bytes");
  std::memset(to, kUnwritten, bytes + bytes_cleared);
  device().thread().open_group.push_back({to, from, bytes, bytes_cleared});
}

void commit_copies() {
  Thread& own = device().thread();
  own.copies.push_back(std::exchange(own.open_group, {}));
}

void wait_for_copies(size_t groups_left) {
  Thread& own = device().thread();
  for (; own.copies.size() > groups_left; own.copies.pop_front()) {
    for (const Copy& copy : own.copies.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<std::byte*>(copy.to) + copy.bytes, 0, copy.bytes_cleared);
    }
  }
}

}  // namespace cuda_on_cpu
