// Times of sums of gradients, on streams whose times are exact.
#include "parallel/reduce_times.h"

#include "parallel/thread_communicator.h"
#include "parallel/timed_reducer.h"
#include "test/support/catch.h"
#include "test/support/reducer_rank.h"
#include "test/support/simulated_time.h"

namespace dstrain::test {
namespace {

// Says when it is read before the device has passed what was marked.
class LateClock : public SimulatedClock {
 public:
  explicit LateClock(const int64_t& marks_passed) : passed_(marks_passed) {}
  double seconds_between(int first, int second) override {
    if (second >= passed_) throw RuntimeFailure("the host waits");
    return SimulatedClock::seconds_between(first, second);
  }

 private:
  const int64_t& passed_;
};
class LateBackend : public SimulatedBackend {
 public:
  explicit LateBackend(const int64_t& marks_passed)
      : SimulatedBackend(/*is_cpu=*/false), passed_(marks_passed) {}
  std::unique_ptr<OpClock> make_clock() override { return std::make_unique<LateClock>(passed_); }

 private:
  const int64_t& passed_;
};

// A sum over two ranks on simulated streams.
class TimedRank {
 public:
  TimedRank(Communicator& world, CompressionMethod method)
      : world_(world, /*sends_wait=*/false), stream_(backend_.make_stream()), times(backend_) {
    declare_some(parameters_);
    range_ = whole_range(parameters_, world.size());
    ReduceRanks ranks;
    ranks.all = &world_;
    GradReducerOptions options;
    options.compression.method = method;
    options.gathers = true;
    reducer = std::make_unique<TimedReducer>(
        make_grad_reducer(options, ranks, parameters_, {range_}), times);
    memory_ = make_reducer_memory(backend_, *reducer);
    reducer->clear(dist());
    whole_.resize(static_cast<size_t>(world.size() * range_.shard));
    shard_.resize(static_cast<size_t>(range_.shard));
  }
  DistStream dist(bool dry = false) { return {backend_.ops(), *stream_, dry}; }
  void reduce(bool dry = false) {
    reducer->reduce_scatter(dist(dry), 0, as_tensor(whole_), as_tensor(shard_));
  }
  void gather() { reducer->all_gather(dist(), 0, as_tensor(shard_), as_tensor(whole_)); }
  void compute() { simulated(*stream_).compute(); }

 private:
  SimulatedBackend backend_{/*is_cpu=*/false};
  SimulatedCommunicator world_;
  std::unique_ptr<Stream> stream_;
  ParameterSet parameters_;
  GradRange range_;
  std::vector<DeviceMemory> memory_;
  Floats whole_, shard_;

 public:
  ReduceTimes times;
  std::unique_ptr<TimedReducer> reducer;
};

TEST_CASE("ReduceTimes: a step's sums and gathers by the time of their stream", "[parallel]") {
  run_rank_threads(2, [](Communicator& world) {
    TimedRank rank(world, CompressionMethod::none);
    rank.reduce();  // before the first step
    rank.reducer->begin_step(1);
    rank.compute();
    rank.reduce();
    rank.compute();
    rank.reduce();
    rank.gather();
    rank.reduce(/*dry=*/true);
    rank.reducer->begin_step(2);
    rank.reduce();
    const ReduceSeconds first = rank.times.take();
    rank_check(first.reduce == 20 && first.gather == 10, "two calls and one");
    rank_check(rank.times.total().reduce == 20, "of the steps taken");
    const ReduceSeconds second = rank.times.take(), none = rank.times.take();
    rank_check(second.reduce == 10 && second.gather == 0, "the second step");
    rank_check(none.reduce == 0, "nothing is left");
    rank_check(rank.times.total().reduce == 30 && rank.times.total().gather == 10, "total");
  });
}

TEST_CASE("ReduceTimes: compressing and adding up count", "[parallel]") {
  run_rank_threads(2, [](Communicator& world) {
    TimedRank rank(world, CompressionMethod::int8);
    rank.reducer->begin_step(1);
    rank.reduce();
    rank.gather();
    const ReduceSeconds seconds = rank.times.take();
    rank_check(seconds.reduce > 10 && seconds.reduce < 20, "an exchange and some operations");
    rank_check(seconds.gather > 10 && seconds.gather < 20, "a gather and some operations");
  });
}

TEST_CASE("ReduceTimes: reducers of one rank share its steps, and nobody waits", "[parallel]") {
  int64_t passed = 0;
  LateBackend backend(passed);
  const auto stream = backend.make_stream();
  ReduceTimes times(backend);
  const auto sum = [&] {
    times.measure(&ReduceSeconds::reduce, *stream, [&] { simulated(*stream).communicate(); });
  };
  for (int64_t step = 5; step < 7; ++step)
    for (int reducer = 0; reducer < 3; ++reducer) {
      times.begin_step(step);
      sum();
    }
  CHECK_THROWS_WITH(times.begin_step(7), "the host waits");
  passed = 6;
  ReduceTimes fresh(backend);
  for (int64_t step = 1; step <= 3; ++step) {
    fresh.begin_step(step);  // the third takes the first
    fresh.measure(&ReduceSeconds::gather, *stream, [&] { simulated(*stream).communicate(); });
  }
  CHECK(fresh.total().gather == 10);
  CHECK(fresh.take().gather == 10);
  CHECK(fresh.take().gather == 10);
  CHECK(fresh.total().gather == 30);
}

}  // namespace
}  // namespace dstrain::test
