// A job is a number of tasks. `ticket` holds the job's number (high half) and how many of its tasks
// nobody has claimed yet (low half), so that one compare-and-swap claims a task of exactly that
// job: a worker that wakes late finds nothing left and never touches a job that has ended. Threads
// spin for a moment between jobs, because a step is many short jobs, and sleep after that.
#include "core/backend/thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/backend/cpu_memory.h"
#include "core/base/error.h"

#ifdef DSTRAIN_HAVE_DNNL
#include <oneapi/dnnl/dnnl_config.h>
#if DNNL_CPU_THREADING_RUNTIME == DNNL_RUNTIME_OMP
#include <omp.h>
#define DSTRAIN_DNNL_USES_OPENMP 1
#endif
#endif

namespace dstrain {
namespace {

constexpr int kTaskBits = 32;
constexpr uint64_t kTaskMask = (uint64_t{1} << kTaskBits) - 1;
// Longer than the gaps between the ops of a step; waking a sleeper takes about 20 microseconds.
constexpr auto kSpinTime = std::chrono::milliseconds(1);
constexpr int kPausesPerYield = 64;

// oneDNN takes its thread count from OpenMP, which keeps one per thread.
class SingleThreadedOneDnn {
 public:
#ifdef DSTRAIN_DNNL_USES_OPENMP
  SingleThreadedOneDnn() : before_(omp_get_max_threads()) {
    omp_set_num_threads(1);
  }
  ~SingleThreadedOneDnn() {
    omp_set_num_threads(before_);
  }

 private:
  int before_;
#else
  SingleThreadedOneDnn() {}
  ~SingleThreadedOneDnn() {}
#endif
};

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `done()` holds or the spin time is over; says which.
template <class Done>
bool spin_until(const Done& done) {
  const auto begin = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < kPausesPerYield; ++i) {
      if (done()) return true;
      pause_briefly();
    }
    std::this_thread::yield();  // where there are more threads than cores, another one may be
                                // needed
  } while (std::chrono::steady_clock::now() - begin < kSpinTime);
  return done();
}

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes), data_(allocate_cpu_memory(bytes)) {}
  Scratch(Scratch&& other) noexcept
      : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Scratch& operator=(Scratch&&) = delete;
  ~Scratch() { free_cpu_memory(data_, bytes_); }
  void* data() const { return data_; }

 private:
  int64_t bytes_;
  void* data_;
};

}  // namespace

struct ThreadPool::State {
  int threads = 1;
  int64_t scratch_bytes = 0;
  std::vector<Scratch> scratch;  // one per thread; the caller has the first
  std::vector<std::thread> workers;

  // The job. Written only while no task is unclaimed or running.
  std::atomic<TaskFunction> function{nullptr};
  std::atomic<const void*> body{nullptr};
  std::atomic<int64_t> tasks{0};

  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> unfinished{0};
  std::atomic<bool> stopping{false};

  // Sleeping. The counters let the common path skip the mutex; every access to them and to what
  // they guard is sequentially consistent, so that a sleeper is seen or the sleeper sees the news.
  alignas(64) std::mutex mutex;
  std::condition_variable work_came, work_ended;
  std::atomic<int> sleeping_workers{0};
  std::atomic<bool> caller_sleeps{false};

  std::mutex error_mutex;
  std::exception_ptr error;  // of the lowest task number, so that it is the same in every run
  int64_t error_task = -1;

  bool work_left() const { return (ticket.load() & kTaskMask) != 0; }

  void run_one(TaskFunction f, const void* b, int64_t task, void* memory) {
    try {
      f(b, task, memory);
    } catch (...) {
      const std::lock_guard lock(error_mutex);
      if (error_task < 0 || task < error_task) {
        error = std::current_exception();
        error_task = task;
      }
    }
  }

  // Claims and runs tasks until none is left.
  void work(void* memory) {
    int64_t finished = 0;
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while ((seen & kTaskMask) != 0) {
      const TaskFunction f = function.load(std::memory_order_relaxed);
      const void* const b = body.load(std::memory_order_relaxed);
      const int64_t task =
          tasks.load(std::memory_order_relaxed) - static_cast<int64_t>(seen & kTaskMask);
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
        continue;
      }
      run_one(f, b, task, memory);
      ++finished;
      seen = ticket.load(std::memory_order_acquire);
    }
    if (finished == 0 || unfinished.fetch_sub(finished) != finished) return;
    if (caller_sleeps.load()) {
      const std::lock_guard lock(mutex);
      work_ended.notify_one();
    }
  }

  void worker_loop(void* memory) {
    const SingleThreadedOneDnn single_threaded;
    while (!stopping.load()) {
      work(memory);
      if (spin_until([&] { return work_left() || stopping.load(); })) continue;
      std::unique_lock lock(mutex);
      sleeping_workers.fetch_add(1);
      work_came.wait(lock, [&] { return work_left() || stopping.load(); });
      sleeping_workers.fetch_sub(1);
    }
  }

  void publish(int64_t count, TaskFunction f, const void* b) {
    function.store(f, std::memory_order_relaxed);
    body.store(b, std::memory_order_relaxed);
    tasks.store(count, std::memory_order_relaxed);
    unfinished.store(count);
    const uint64_t job = (ticket.load(std::memory_order_relaxed) >> kTaskBits) + 1;
    ticket.store(job << kTaskBits | static_cast<uint64_t>(count));
    if (sleeping_workers.load() > 0) {
      const std::lock_guard lock(mutex);
      work_came.notify_all();
    }
  }

  void wait_until_finished() {
    const auto all_finished = [&] { return unfinished.load() == 0; };
    if (spin_until(all_finished)) return;
    std::unique_lock lock(mutex);
    caller_sleeps.store(true);
    work_ended.wait(lock, all_finished);
    caller_sleeps.store(false);
  }

  void rethrow_error() {
    if (error_task < 0) return;
    error_task = -1;
    std::rethrow_exception(std::exchange(error, nullptr));
  }

  void stop() {
    stopping.store(true);
    {
      const std::lock_guard lock(mutex);
      work_came.notify_all();
    }
    for (std::thread& worker : workers) worker.join();
  }
};

ThreadPool::ThreadPool(int threads, int64_t scratch_bytes) : state_(std::make_unique<State>()) {
  DSTRAIN_CHECK(threads >= 1 && scratch_bytes >= 0, "a thread pool has at least one thread");
  State& s = *state_;
  s.threads = threads;
  s.scratch_bytes = scratch_bytes;
  for (int i = 0; i < threads; ++i) s.scratch.emplace_back(scratch_bytes);
  try {
    for (int i = 1; i < threads; ++i) {
      void* const memory = s.scratch[static_cast<size_t>(i)].data();
      s.workers.emplace_back([&s, memory] { s.worker_loop(memory); });
    }
  } catch (const std::system_error& error) {
    s.stop();
    throw RuntimeFailure("cannot start " + std::to_string(threads) +
                         " worker threads: " + error.what() + "; ask for fewer threads");
  }
}

ThreadPool::~ThreadPool() {
  state_->stop();
}

int ThreadPool::threads() const {
  return state_->threads;
}

int64_t ThreadPool::scratch_bytes() const {
  return state_->scratch_bytes;
}

void ThreadPool::run_tasks(int64_t tasks, TaskFunction function, const void* body) {
  if (tasks <= 0) return;
  DSTRAIN_CHECK(tasks <= static_cast<int64_t>(kTaskMask), "too many tasks in one job");
  State& s = *state_;
  const SingleThreadedOneDnn single_threaded;
  void* const memory = s.scratch[0].data();
  if (s.threads == 1 || tasks == 1) {
    for (int64_t task = 0; task < tasks; ++task) s.run_one(function, body, task, memory);
  } else {
    s.publish(tasks, function, body);
    s.work(memory);
    s.wait_until_finished();
  }
  s.rethrow_error();
}

}  // namespace dstrain
