#include "core/backend/matmul_bench.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "core/backend/thread_pool.h"
#include "core/base/rng.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dstrain {
namespace {

constexpr int64_t kLargeFlops = 8'000'000;

void set_library_threads([[maybe_unused]] int threads) {
#ifdef _OPENMP
  omp_set_num_threads(threads);
#endif
}

// Three operands of the largest size; every product reads and writes their beginnings.
struct Operands {
  std::vector<float> a, b, c;
  explicit Operands(std::span<const ProductShape> products) {
    int64_t sizes[3] = {1, 1, 1};
    for (const ProductShape& p : products) {
      sizes[0] = std::max(sizes[0], p.m * p.k);
      sizes[1] = std::max(sizes[1], p.k * p.n);
      sizes[2] = std::max(sizes[2], p.m * p.n);
    }
    std::vector<float>* const all[3] = {&a, &b, &c};
    for (int i = 0; i < 3; ++i) {
      all[i]->resize(static_cast<size_t>(sizes[i]));
      for (size_t j = 0; j < all[i]->size(); ++j)
        (*all[i])[j] = static_cast<float>(random_uniform(1, static_cast<uint64_t>(i), j) - 0.5);
    }
  }
  void run(const ProductShape& p) {
    gemm(p.ta, p.tb, p.m, p.n, p.k, 1.0f, a.data(), p.ta == Trans::no ? p.k : p.m, b.data(),
         p.tb == Trans::no ? p.n : p.k, 0.0f, c.data(), p.n);
  }
};

}  // namespace

double time_products(std::span<const ProductShape> products, int threads, int repeats) {
  std::vector<ProductShape> large, small;
  for (const ProductShape& p : products)
    (2 * p.m * p.n * p.k >= kLargeFlops ? large : small).push_back(p);
  Operands shared(large);
  std::vector<Operands> own(static_cast<size_t>(threads), Operands(small));
  ThreadPool pool(threads, 1024);
  double best = 1e30;
  for (int repeat = 0; repeat <= repeats; ++repeat) {  // the first pass warms up
    set_library_threads(threads);
    const auto begin = std::chrono::steady_clock::now();
    for (const ProductShape& p : large) shared.run(p);
    const auto middle = std::chrono::steady_clock::now();
    set_library_threads(1);
    const int64_t share = (std::ssize(small) + threads - 1) / threads;
    pool.run(threads, [&](int64_t task, void*) {
      for (int64_t i = task * share; i < std::min(std::ssize(small), (task + 1) * share); ++i)
        own[static_cast<size_t>(task)].run(small[static_cast<size_t>(i)]);
    });
    const auto end = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(middle - begin).count() +
                           std::chrono::duration<double>(end - middle).count();
    if (repeat > 0) best = std::min(best, seconds);
  }
  set_library_threads(1);
  return best;
}

}  // namespace dstrain
