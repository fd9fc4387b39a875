#include "parallel/sum_timing.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <optional>

#include "core/backend/op_clock.h"

namespace dstrain {
namespace {

constexpr std::array kSizes = {int64_t{1} << 16, int64_t{1} << 20, kLargestTimed};
// Of whole sums of a size there are as many as take so long, from three to fifteen.
constexpr double kSecondsOfSize = 0.3;
constexpr int kFewest = 3, kMost = 15;
// Where one takes so long, the rate of the link is known.
constexpr double kSlowSeconds = 0.1;
constexpr int64_t kShardAlignment = 64;

using Seconds = std::array<double, kSumMethods.size()>;  // by kSumMethods; 0: not timed

// Ascending; the last one is the range's, or kLargestTimed.
std::vector<int64_t> sizes_up_to(int64_t largest) {
  std::vector<int64_t> sizes;
  for (const int64_t size : kSizes)
    if (sizes.empty() || sizes.back() < largest) sizes.push_back(std::min(size, largest));
  return sizes;
}

// Of each method the most that any rank says.
Seconds slowest(Communicator& world, const Seconds& mine) {
  Seconds all = {};
  for (const std::string& text : world.all_gather_text(fmt::format("{}", fmt::join(mine, " ")))) {
    const char* at = text.data();
    const char* const end = at + text.size();
    for (double& most : all) {
      double seconds = 0;
      const std::from_chars_result read = std::from_chars(at, end, seconds);
      DSTRAIN_CHECK(read.ec == std::errc(), "a rank says that sums took '" + text + "'");
      most = std::max(most, seconds);
      at = std::min(read.ptr + 1, end);
    }
  }
  return all;
}

double median(std::vector<double> x) {
  const auto middle = x.begin() + std::ssize(x) / 2;
  std::nth_element(x.begin(), middle, x.end());
  return *middle;
}

// Sums of one size with each method, in memory of their own.
class SumTimer {
 public:
  SumTimer(const GradReducerOptions& options, const ReduceRanks& ranks, int64_t elements,
           Backend& backend, Stream& stream)
      : ranks_(*ranks.all),
        dist_{backend.ops(), stream},
        clock_(backend.make_clock()),
        gathers_(options.gathers) {
    const int64_t size = ranks_.size(), unit = size * kShardAlignment,
                  shard = (elements + unit - 1) / unit * kShardAlignment;
    const auto make = [&](int64_t count) {
      memory_.emplace_back(backend, count * 4, MemoryKind::device);
      return Tensor(memory_.back().data(), DType::f32, {count});
    };
    whole_ = make(size * shard);
    shard_ = make(shard);
    if (gathers_) gathered_ = make(size * shard);
    dist_.ops.fill_normal(stream, whole_, /*seed=*/1, /*stream=*/0, /*std=*/1,
                          {.global = size * shard, .extent = size * shard});
    for (const CompressionMethod method : kSumMethods)
      reducers_.push_back(make_reducer(options, method, ranks, shard, backend));
  }

  Seconds time_once() {
    Seconds seconds = {};
    for (size_t m = 0; m < reducers_.size(); ++m)
      if (reducers_[m]) seconds[m] = time(*reducers_[m]);
    return seconds;
  }

 private:
  // Null where the job does not allow the method.
  std::unique_ptr<GradReducer> make_reducer(GradReducerOptions options, CompressionMethod method,
                                            const ReduceRanks& ranks, int64_t shard,
                                            Backend& backend) {
    CompressionConfig& compression = options.compression;
    if (method == CompressionMethod::topk && compression.density <= 0) return nullptr;
    compression.method = method;
    compression.dense_steps = 0;
    auto reducer =
        make_grad_reducer(options, ranks, no_parameters_, {{0, ranks.all->size() * shard, shard}});
    reducer->make_memory([&](const char* owner, MemoryKind kind, const auto& make) {
      Arena measuring(owner);
      make(measuring);
      memory_.emplace_back(backend, measuring.peak(), kind);
      Arena arena(owner, memory_.back().data(), measuring.peak());
      make(arena);
    });
    reducer->clear(dist_);
    reducer->begin_step(0);
    return reducer;
  }

  double time(GradReducer& reducer) {
    dist_.stream.synchronize();
    ranks_.barrier();
    const int begin = clock_->mark(dist_.stream);
    reducer.reduce_scatter(dist_, 0, whole_, shard_);
    if (gathers_) reducer.all_gather(dist_, 0, shard_, gathered_);
    const double seconds = clock_->seconds_between(begin, clock_->mark(dist_.stream));
    clock_->clear();
    return seconds;
  }

  Communicator& ranks_;
  const DistStream dist_;
  std::unique_ptr<OpClock> clock_;
  const bool gathers_;
  std::vector<DeviceMemory> memory_;
  Tensor whole_, shard_, gathered_;
  const ParameterSet no_parameters_;
  std::vector<std::unique_ptr<GradReducer>> reducers_;
};

// On the slowest rank. `timer` is null on ranks that have nothing to compress.
Seconds time_size(SumTimer* timer, Communicator& world) {
  // The first sums connect ranks and load code.
  const Seconds first = slowest(world, timer ? timer->time_once() : Seconds{});
  const double wanted = kSecondsOfSize / std::max(first[0], kSecondsOfSize / kMost);
  const int repetitions = std::max(kFewest, static_cast<int>(wanted));
  std::array<std::vector<double>, kSumMethods.size()> all;
  for (int i = 0; i < repetitions; ++i) {
    const Seconds once = timer ? timer->time_once() : Seconds{};
    for (size_t m = 0; m < all.size(); ++m) all[m].push_back(once[m]);
  }
  Seconds seconds = {};
  for (size_t m = 0; m < all.size(); ++m)
    seconds[m] = kSumMethods[m] == CompressionMethod::none ? std::ranges::min(all[m])
                                                           : median(std::move(all[m]));
  return slowest(world, seconds);
}

}  // namespace

MethodTimes time_sums(const GradReducerOptions& options, const ReduceRanks& ranks, int64_t largest,
                      Communicator& world, Backend& backend) {
  const bool compresses = can_compress(options.compression, ranks);
  const std::unique_ptr<Stream> stream = backend.make_urgent_stream();
  MethodTimes times;
  for (const int64_t elements : sizes_up_to(largest)) {
    std::optional<SumTimer> timer;
    if (compresses) timer.emplace(options, ranks, elements, backend, *stream);
    const Seconds seconds = time_size(timer ? &*timer : nullptr, world);
    for (size_t m = 0; m < seconds.size(); ++m)
      if (seconds[m] > 0) times.by_method[m].add(elements, seconds[m]);
    if (seconds[0] > kSlowSeconds) break;
  }
  return times;
}

}  // namespace dstrain
