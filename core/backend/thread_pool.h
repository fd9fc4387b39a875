// Worker threads for one rank. Work is cut into numbered tasks whose number and size depend on the
// problem only, never on the threads: any thread may run any task, and results are the same bits
// with one thread or sixty-four.
#pragma once

#include <cstdint>
#include <memory>

namespace dstrain {

class ThreadPool {
 public:
  // `threads` counts the caller: 1 runs everything in the calling thread. Each thread keeps oneDNN
  // to itself (one thread per call) and owns `scratch_bytes` of memory, 64-byte aligned.
  ThreadPool(int threads, int64_t scratch_bytes);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;
  int64_t scratch_bytes() const;

  // Runs body(task, scratch) for every task in [0, tasks) and returns when all are done. `scratch`
  // is the running thread's own memory. Not reentrant; one caller at a time. An exception of a task
  // is rethrown here after the others have finished.
  template <class Body>
  void run(int64_t tasks, const Body& body) {
    run_tasks(
        tasks,
        [](const void* f, int64_t task, void* scratch) {
          (*static_cast<const Body*>(f))(task, scratch);
        },
        &body);
  }

  // Runs body(begin, end) over [0, count) in runs of `grain`.
  template <class Body>
  void run_ranges(int64_t count, int64_t grain, const Body& body) {
    run((count + grain - 1) / grain, [&](int64_t task, void*) {
      const int64_t begin = task * grain;
      body(begin, begin + grain < count ? begin + grain : count);
    });
  }

 private:
  using TaskFunction = void (*)(const void* body, int64_t task, void* scratch);
  void run_tasks(int64_t tasks, TaskFunction function, const void* body);

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dstrain
