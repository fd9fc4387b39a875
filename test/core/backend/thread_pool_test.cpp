#include "core/backend/thread_pool.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <ctime>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "test/support/catch.h"

#ifdef DSTRAIN_HAVE_DNNL
#include <omp.h>
#endif

namespace dstrain {
namespace {

TEST_CASE("a pool runs every task exactly once", "[core][pool]") {
  const int threads = GENERATE(1, 2, 3, 8);
  ThreadPool pool(threads, 1024);
  CHECK(pool.threads() == threads);
  CHECK(pool.scratch_bytes() == 1024);
  for (const int64_t tasks : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
    pool.run(tasks, [&](int64_t task, void*) { ++runs[static_cast<size_t>(task)]; });
    for (const auto& count : runs) REQUIRE(count == 1);
  }
}

TEST_CASE("many short jobs in a row", "[core][pool]") {
  ThreadPool pool(3, 64);
  int64_t total = 0;
  for (int64_t job = 0; job < 20000; ++job) {
    std::atomic<int64_t> sum{0};
    pool.run(5, [&](int64_t task, void*) { sum += task + job; });
    total += sum;
  }
  CHECK(total == 20000 * 10 + 5 * (20000LL * 19999 / 2));
}

TEST_CASE("what tasks wrote is visible after run, also when threads had gone to sleep",
          "[core][pool]") {
  ThreadPool pool(4, 64);
  std::vector<int64_t> values(1000);
  for (int round = 0; round < 5; ++round) {
    pool.run(1000, [&](int64_t task, void*) { values[static_cast<size_t>(task)] += task; });
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  CHECK(std::accumulate(values.begin(), values.end(), int64_t{0}) == 5 * 999 * 1000 / 2);
}

TEST_CASE("ranges cover the count without overlap", "[core][pool]") {
  ThreadPool pool(2, 64);
  std::vector<int> hits(103);
  pool.run_ranges(103, 10, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
  });
  for (const int hit : hits) REQUIRE(hit == 1);
}

TEST_CASE("each thread has scratch memory of its own, 64-byte aligned", "[core][pool]") {
  constexpr int64_t kBytes = 4096;
  ThreadPool pool(4, kBytes);
  std::atomic<bool> intact{true};
  pool.run(2000, [&](int64_t task, void* scratch) {
    if (reinterpret_cast<uintptr_t>(scratch) % 64 != 0) intact = false;
    auto* const bytes = static_cast<unsigned char*>(scratch);
    const auto mark = static_cast<unsigned char>(task);
    std::memset(bytes, mark, kBytes);
    for (int64_t i = 0; i < kBytes; ++i)
      if (bytes[i] != mark) intact = false;
  });
  CHECK(intact);
}

TEST_CASE("the exception of the first failing task arrives after all others have run",
          "[core][pool]") {
  const int threads = GENERATE(1, 2, 4);
  ThreadPool pool(threads, 64);
  for (int round = 0; round < 50; ++round) {
    std::atomic<int> runs{0};
    std::string message;
    try {
      pool.run(40, [&](int64_t task, void*) {
        ++runs;
        if (task % 10 == 3) throw std::runtime_error("task " + std::to_string(task));
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    REQUIRE(message == "task 3");
    REQUIRE(runs == 40);
  }
  std::atomic<int> runs{0};  // the pool goes on
  pool.run(8, [&](int64_t, void*) { ++runs; });
  CHECK(runs == 8);
}

TEST_CASE("pools of several rank threads do not disturb each other", "[core][pool]") {
  std::vector<std::thread> ranks;
  std::atomic<int64_t> total{0};
  for (int rank = 0; rank < 6; ++rank) {
    ranks.emplace_back([&total, rank] {
      ThreadPool pool(1 + rank % 2, 256);
      for (int job = 0; job < 300; ++job) pool.run(4, [&](int64_t task, void*) { total += task; });
    });
  }
  for (std::thread& rank : ranks) rank.join();
  CHECK(total == 6 * 300 * 6);
}

TEST_CASE("an idle pool sleeps", "[core][pool]") {
  ThreadPool pool(4, 64);
  pool.run(4, [](int64_t, void*) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double burnt = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  CHECK(burnt < 0.02);
}

#ifdef DSTRAIN_HAVE_DNNL
TEST_CASE("oneDNN is kept to one thread inside tasks and left alone outside", "[core][pool]") {
  omp_set_num_threads(2);
  ThreadPool pool(3, 64);
  std::atomic<int> wrong{0};
  pool.run(200, [&](int64_t, void*) {
    if (omp_get_max_threads() != 1) ++wrong;
  });
  CHECK(wrong == 0);
  CHECK(omp_get_max_threads() == 2);
}
#endif

}  // namespace
}  // namespace dstrain
