// compression.method auto: measured links, the same choice on all ranks, sums by the chosen
// methods, and residuals of ranges whose method changes.
#include "parallel/auto_compression.h"

#include <cmath>
#include <map>
#include <mutex>

#include "parallel/chosen_reducer.h"
#include "parallel/sum_timing.h"
#include "test/support/catch.h"
#include "test/support/reducer_rank.h"
#include "test/support/slow_link.h"

namespace dstrain::test {
namespace {

using Catch::Contains;

constexpr auto kNone = CompressionMethod::none, kInt8 = CompressionMethod::int8,
               kTopk = CompressionMethod::topk;
constexpr auto kGroup = ReduceGroup::replicated;
constexpr int64_t kElements = int64_t{1} << 18;

GradReducerOptions automatic(bool gathers, double density = 0.05) {
  GradReducerOptions options;
  options.compression.method = CompressionMethod::automatic;
  options.compression.density = density;
  options.gathers = gathers;
  return options;
}

ReduceRanks on_one_node(Communicator& world) {
  ReduceRanks ranks;
  ranks.all = &world;
  return ranks;
}

MethodTimes times_for(CompressionMethod fastest) {
  MethodTimes times;
  for (const CompressionMethod method : kSumMethods)
    times.of(method).add(1, method == fastest ? 1 : 10);
  return times;
}

// What two ranks choose over a link of this rate (0: as fast as threads are).
std::vector<CompressionMethod> chosen_over(double bytes_per_second, double density, bool gathers) {
  std::vector<CompressionMethod> chosen(2, CompressionMethod::automatic);
  run_ranks(2, [&](RankContext& rank) {
    std::unique_ptr<Communicator> slow;
    if (bytes_per_second > 0) slow = std::make_unique<SlowLink>(rank.world, bytes_per_second);
    Communicator& world = slow ? *slow : rank.world;
    const MethodTimes times =
        time_sums(automatic(gathers, density), on_one_node(world), kElements, world, rank.backend);
    rank_check(times.of(kTopk).empty() == (density == 0), "density 0 leaves top-k out");
    chosen.at(static_cast<size_t>(world.rank())) = choose_method(times, kElements);
  });
  return chosen;
}

TEST_CASE("auto compression: the speed of the link decides", "[parallel]") {
  const bool gathers = GENERATE(false, true);
  using Chosen = std::vector<CompressionMethod>;
  CHECK(chosen_over(0, 0.05, gathers) == Chosen{kNone, kNone});
  CHECK(chosen_over(20e6, 0, gathers) == Chosen{kInt8, kInt8});
  CHECK(chosen_over(4e6, 0.05, gathers) == Chosen{kTopk, kTopk});
}

TEST_CASE("auto compression: the slowest rank counts, on all", "[parallel]") {
  std::vector<double> seconds(3);
  run_ranks(3, [&](RankContext& rank) {
    // The first rank's link is slow; the others wait for it in the sums of that link alone.
    SlowLink slow(rank.world, rank.world.rank() == 0 ? 4e6 : 1e12);
    const MethodTimes times =
        time_sums(automatic(false, 0), on_one_node(slow), 1 << 16, rank.world, rank.backend);
    seconds.at(static_cast<size_t>(rank.world.rank())) = times.of(kNone).at(1 << 16);
  });
  CHECK(seconds[0] > 0.04);  // 2 thirds of 256 KiB
  CHECK(seconds[1] == seconds[0]);
  CHECK(seconds[2] == seconds[0]);
}

TEST_CASE("auto compression: nothing is measured where nothing would be compressed", "[parallel]") {
  run_ranks(2, [](RankContext& rank) {
    GradReducerOptions options = automatic(false);
    options.compression.scope = CompressionScope::inter_node;
    const int64_t before = rank.world.bytes_sent();
    AutoCompression chooser({});
    const ReduceRanks ranks = on_one_node(rank.world);
    chooser.measure(kGroup, options, ranks, kElements, rank.world, rank.backend);
    rank_check(rank.world.bytes_sent() - before < 1000, "ranks of one node send no gradients");
    ParameterSet parameters;
    declare_some(parameters);
    const auto reducer =
        chooser.make_reducer(kGroup, options, ranks, parameters, {whole_range(parameters, 2)});
    rank_check(chooser.describe() == "auto: none for 1 range of 17,664 elements",
               chooser.describe());
    rank_check(chooser.chosen().text().empty(), "nothing was chosen");
  });
}

TEST_CASE("auto compression: a choice that differs between ranks is found", "[parallel]") {
  const auto choose = [](CompressionMethod of_the_last) {
    run_ranks(3, [&](RankContext& rank) {
      ParameterSet parameters;
      declare_some(parameters);
      AutoCompression chooser({});
      chooser.set_times(kGroup, times_for(rank.world.rank() == 2 ? of_the_last : kInt8));
      chooser.make_reducer(kGroup, automatic(false), on_one_node(rank.world), parameters,
                           {whole_range(parameters, 3)});
    });
  };
  choose(kInt8);
  CHECK_THROWS_WITH(choose(kTopk),
                    Contains("'int8' on the first") && Contains("'topk' on rank 2 of them"));
}

// Ranges of a ParameterSet of declare_some(): the parameters of block 0, and those of block 1.
std::vector<GradRange> two_ranges(const ParameterSet& set, int ranks) {
  const int64_t cut = set.find("weight")->offset, end = set.trainable_elements();
  const auto shard = [&](int64_t n) { return (n + ranks - 1) / ranks; };
  return {{0, cut, shard(cut)}, {cut, end, shard(end - cut)}};
}

// A rank with both ranges, each with a method of its own.
class TwoRanges {
 public:
  TwoRanges(RankContext& rank, std::vector<CompressionMethod> methods, const SavedKinds& kinds = {},
            bool gathers = false)
      : rank_(rank), dist_{rank.backend.ops(), rank.stream} {
    declare_some(parameters);
    ranges = two_ranges(parameters, rank.world.size());
    reducer = make_chosen_reducer(automatic(gathers), methods, kinds, on_one_node(rank.world),
                                  parameters, ranges);
    memory_ = make_reducer_memory(rank.backend, *reducer);
    reducer->clear(dist_);
  }
  // Another gradient for every rank, range and step; zero in padding and gaps.
  Floats grad(size_t range, uint32_t step) const {
    const GradRange& of = ranges[range];
    const int64_t n = rank_.world.size() * of.shard;
    const Floats values = random_floats(n, 1000 * step + 100 * static_cast<uint32_t>(range) +
                                               static_cast<uint32_t>(rank_.world.rank()));
    Floats whole(values.size(), 0.0f);
    for (const Parameter& p : parameters.all())
      if (p.offset >= of.begin && p.offset < of.end)
        std::copy_n(values.begin() + (p.offset - of.begin), p.numel(),
                    whole.begin() + (p.offset - of.begin));
    return whole;
  }
  Floats reduce(size_t range, Floats whole) {
    Floats shard(static_cast<size_t>(ranges[range].shard));
    reducer->reduce_scatter(dist_, static_cast<int>(range), as_tensor(whole), as_tensor(shard));
    return shard;
  }
  Floats dense(size_t range, Floats whole) {
    Floats shard(static_cast<size_t>(ranges[range].shard));
    rank_.world.reduce_scatter_sum(rank_.stream, as_tensor(whole), as_tensor(shard));
    return shard;
  }
  void end_step() {
    const StepScalars scalars;
    reducer->end_step(dist_, &scalars);
  }

  ParameterSet parameters;
  std::vector<GradRange> ranges;
  std::unique_ptr<GradReducer> reducer;

 private:
  RankContext& rank_;
  DistStream dist_;
  std::vector<DeviceMemory> memory_;
};

TEST_CASE("auto compression: each range is summed with its own method", "[parallel]") {
  const auto methods = GENERATE(std::vector{kNone, kInt8}, std::vector{kTopk, kNone},
                                std::vector{kInt8, kTopk}, std::vector{kNone, kNone});
  run_ranks(3, [&](RankContext& rank) {
    TwoRanges both(rank, methods);
    const int64_t ranks = rank.world.size();
    for (size_t i : {1u, 0u}) {
      const int64_t before = both.reducer->traffic().reduce.sent;
      const Floats sum = both.reduce(i, both.grad(i, 1)), expected = both.dense(i, both.grad(i, 1));
      const double sent = static_cast<double>(both.reducer->traffic().reduce.sent - before),
                   whole = static_cast<double>((ranks - 1) * both.ranges[i].shard * 4);
      rank_check(same_bits(sum, expected) == (methods[i] == kNone), "exact without compression");
      rank_check(methods[i] == kNone   ? sent == whole
                 : methods[i] == kInt8 ? sent > 0.25 * whole && sent < 0.3 * whole
                                       : sent < 0.1 * whole,
                 "bytes of the method");
    }
    both.end_step();
    // Residuals are there for the parameters that are compressed.
    for (const StateSlice& slice : both.reducer->saved()) {
      const bool is_first = slice.parameter->offset < both.ranges[1].begin;
      rank_check(methods[is_first ? 0 : 1] != kNone, slice.parameter->spec.name);
    }
    rank_check(both.reducer->saved().empty() == (methods == std::vector{kNone, kNone}), "some");
  });
}

// A checkpoint's residuals, whole.
class Residuals {
 public:
  void save(const GradReducer& reducer) {
    const std::scoped_lock lock(mutex_);
    for (const StateSlice& slice : reducer.saved()) {
      Floats& tensor = tensors_[slice.parameter->spec.name][slice.kind];
      tensor.resize(static_cast<size_t>(slice.parameter->numel()));
      std::copy_n(slice.data.data<float>(), slice.end - slice.begin, tensor.begin() + slice.begin);
    }
  }
  void load(const GradReducer& reducer) const {
    for (const StateSlice& slice : reducer.loaded(kinds())) {
      const Floats& tensor = tensors_.at(slice.parameter->spec.name).at(slice.kind);
      for (int64_t i = slice.begin; i < slice.end; ++i) {
        float& element = slice.data.data<float>()[i - slice.begin];
        element = tensor[static_cast<size_t>(i)] + (slice.add ? element : 0.0f);
      }
    }
  }
  SavedKinds kinds() const {
    return [this](const Parameter& p) {
      std::vector<std::string> found;
      if (const auto at = tensors_.find(p.spec.name); at != tensors_.end())
        for (const auto& [kind, tensor] : at->second) found.push_back(kind);
      return found;
    };
  }
  // Of element i of the flat range, over kinds.
  std::vector<double> sums(const ParameterSet& parameters) const {
    std::vector<double> all(static_cast<size_t>(parameters.trainable_elements()));
    for (const Parameter& p : parameters.all())
      if (const auto at = tensors_.find(p.spec.name); at != tensors_.end())
        for (const auto& [kind, tensor] : at->second)
          for (size_t i = 0; i < tensor.size(); ++i)
            all[static_cast<size_t>(p.offset) + i] += static_cast<double>(tensor[i]);
    return all;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::map<std::string, Floats>> tensors_;
};

// The sum over ranks of what range i was given, and what arrived, by the elements of the flat
// range.
void add_shard(std::vector<double>& to, const GradRange& range, int rank, const Floats& shard) {
  for (int64_t i = 0; i < range.shard; ++i) {
    const int64_t at = range.begin + rank * range.shard + i;
    if (at < range.end)
      to[static_cast<size_t>(at)] += static_cast<double>(shard[static_cast<size_t>(i)]);
  }
}

TEST_CASE("auto compression: nothing is lost where a resumed job chooses otherwise", "[parallel]") {
  const auto before = GENERATE(std::vector{kTopk, kTopk}, std::vector{kInt8, kTopk});
  const auto after =
      GENERATE(std::vector{kNone, kInt8}, std::vector{kNone, kNone}, std::vector{kInt8, kNone});
  const int ranks_after = GENERATE(2, 3);
  Residuals residuals, left;
  run_ranks(3, [&](RankContext& rank) {
    TwoRanges both(rank, before);
    for (uint32_t step = 1; step <= 3; ++step) {
      for (size_t i : {0u, 1u}) both.reduce(i, both.grad(i, step));
      both.end_step();
    }
    residuals.save(*both.reducer);
  });
  std::mutex mutex;
  std::vector<double> arrived, expected;
  run_ranks(ranks_after, [&](RankContext& rank) {
    TwoRanges both(rank, after, residuals.kinds());
    residuals.load(*both.reducer);
    {
      const std::scoped_lock lock(mutex);
      if (expected.empty()) expected = residuals.sums(both.parameters);
      arrived.resize(expected.size());
    }
    for (uint32_t step = 4; step <= 5; ++step) {
      for (size_t i : {0u, 1u}) {
        const Floats sum = both.reduce(i, both.grad(i, step)),
                     whole = both.dense(i, both.grad(i, step));
        const bool is_whole = after[i] == kNone && step == 5;
        rank_check(!is_whole || same_bits(sum, whole), "leftovers are added once");
        const std::scoped_lock lock(mutex);
        add_shard(arrived, both.ranges[i], rank.world.rank(), sum);
        add_shard(expected, both.ranges[i], rank.world.rank(), whole);
      }
      both.end_step();
    }
    for (const StateSlice& slice : both.reducer->saved()) {
      const bool is_first = slice.parameter->offset < both.ranges[1].begin;
      rank_check(after[is_first ? 0 : 1] != kNone, "what was added is not saved");
    }
    left.save(*both.reducer);
    const std::scoped_lock lock(mutex);
    if (rank.world.rank() == 0) {
      ParameterSet parameters;
      declare_some(parameters);
    }
  });
  ParameterSet parameters;
  declare_some(parameters);
  const std::vector<double> unsent = left.sums(parameters);
  double worst = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    worst = std::max(worst, std::fabs(arrived[i] + unsent[i] - expected[i]));
    size = std::max(size, std::fabs(expected[i]));
  }
  CHECK(size > 5);
  CHECK(worst < 1e-5 * size);
}

TEST_CASE("auto compression: leftovers that were not added are saved again", "[parallel]") {
  Residuals residuals, again;
  run_ranks(2, [&](RankContext& rank) {
    TwoRanges both(rank, {kTopk, kTopk});
    for (size_t i : {0u, 1u}) both.reduce(i, both.grad(i, 1));
    both.end_step();
    residuals.save(*both.reducer);
  });
  run_ranks(2, [&](RankContext& rank) {
    TwoRanges both(rank, {kNone, kNone}, residuals.kinds());
    residuals.load(*both.reducer);
    again.save(*both.reducer);
  });
  ParameterSet parameters;
  declare_some(parameters);
  const std::vector<double> a = residuals.sums(parameters), b = again.sums(parameters);
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::fabs(a[i] - b[i]));
  CHECK(worst < 1e-6);
}

TEST_CASE("auto compression: the checkpoint's choice, and what is told of it", "[parallel]") {
  run_ranks(2, [](RankContext& rank) {
    ParameterSet parameters;
    declare_some(parameters);
    const std::vector<GradRange> ranges = two_ranges(parameters, 2);
    const auto choose = [&](const MethodTimes& times, EarlierCompression earlier) {
      AutoCompression chooser(std::move(earlier));
      chooser.set_times(kGroup, times);
      chooser.make_reducer(kGroup, automatic(false), on_one_node(rank.world), parameters, ranges);
      return chooser;
    };
    MethodTimes times;
    times.of(kNone).add(1000, 1e-3);
    times.of(kNone).add(100000, 11e-3);
    times.of(kInt8).add(1000, 1.5e-3);
    times.of(kInt8).add(100000, 4e-3);
    const AutoCompression first = choose(times, {});
    rank_check(first.chosen().text() ==
                   "replicated of 2: 512 none, " + std::to_string(2 * ranges[1].shard) + " int8",
               first.chosen().text());
    rank_check(first.describe().find("auto: none for 1 range of 512 elements, int8 for 1 range of "
                                     "17,") == 0 &&
                   first.describe().find("; predicted to sum once in ") != std::string::npos &&
                   first.describe().find("checkpoint") == std::string::npos,
               first.describe());
    // Times have changed a little, and a lot.
    MethodTimes near = times_for(kNone), far = times_for(kNone);
    near.of(kInt8) = SumTimes();
    near.of(kInt8).add(1, 0.9);
    const EarlierCompression earlier{ChosenMethods::parse(first.chosen().text()), {}};
    const AutoCompression kept = choose(near, earlier), changed = choose(far, earlier);
    rank_check(kept.chosen().text() == first.chosen().text(), kept.chosen().text());
    rank_check(kept.describe().ends_with("; 1 range as in the checkpoint"), kept.describe());
    rank_check(changed.chosen().text().find("int8") == std::string::npos, changed.chosen().text());
  });
}

TEST_CASE("auto compression: a plan holds the method that takes most", "[parallel]") {
  CompressionConfig config;
  CHECK(largest_method(config) == kInt8);
  config.density = 0.9;
  CHECK(largest_method(config) == kTopk);
  config.density = 0;
  CHECK(largest_method(config) == kInt8);
}

}  // namespace
}  // namespace dstrain::test
