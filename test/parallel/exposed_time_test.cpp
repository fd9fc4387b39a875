// How long computing waits for communication, on streams whose times are exact.
#include "parallel/exposed_time.h"

#include <fmt/format.h>

#include <mutex>
#include <set>

#include "parallel/comm_queue.h"
#include "parallel/random_sequences.h"
#include "parallel/rank_job.h"
#include "parallel/thread_communicator.h"
#include "test/support/catch.h"
#include "test/support/layout_jobs.h"
#include "test/support/rank_threads.h"
#include "test/support/simulated_time.h"

namespace dstrain::test {
namespace {

using Milliseconds = std::optional<double>;

Milliseconds part(const ExposedRecord& record, CommKind kind) {
  return record.ms[static_cast<size_t>(kind)];
}

// A stream that computes, and one beside it.
struct Streams {
  explicit Streams(bool is_cpu)
      : backend(is_cpu), exposed(backend, /*measures=*/true), queue(backend, exposed) {}

  DistStream dist() { return {backend.ops(), *computing}; }
  void compute(int64_t seconds) {
    for (int64_t i = 0; i < seconds; ++i) simulated(*computing).compute();
  }
  void send(CommKind kind, CommPoint& sent) {
    const DistStream comm = queue.after(dist());
    exposed.beside(kind, comm.stream, [&] { simulated(comm.stream).communicate(); });
    sent.set(comm);
  }

  SimulatedBackend backend;
  ExposedTime exposed;
  CommQueue queue;
  std::unique_ptr<Stream> computing = backend.make_stream();
};

// Two steps of the job on this rank, whose times are taken after both.
class RankSteps {
 public:
  RankSteps(const LayoutJob& job, Communicator& world, bool is_cpu)
      : config_(job.config),
        backend_(is_cpu),
        world_(world, /*sends_wait=*/is_cpu),
        job_(job.config, job.shape, world_, backend_, "here", /*training=*/true),
        sequences_(job.config) {
    job_.engine().allocate();
    job_.engine().initialize(1);
  }

  void run() {
    const double first = run_step(0), second = run_step(1);
    for (const double waited : {first, second}) {
      job_.engine().take_result();
      exposed_ = job_.exposed().take();
      rank_check(exposed_.total_ms() == waited,
                 fmt::format("{} ms are exposed of {}", exposed_.total_ms(), waited));
    }
  }
  const ExposedRecord& exposed() const { return exposed_; }

 private:
  // Milliseconds in which the stream that computes did not.
  double run_step(int64_t number) {
    TrainEngine& engine = job_.engine();
    const SimulatedStream& stream = simulated(engine.stream());
    const int64_t idle = stream.now() - stream.computed();
    const AxisPlace& data = job_.mesh().place().data;
    const int64_t B = config_.train.micro_batch, G = config_.train.global_batch;
    const int64_t first = number * G, micro_batches = G / (B * data.size);
    job_.exposed().begin_step();
    engine.begin_step(1e-3, sequences_.batch(first, G).valid_tokens());
    job_.runner().run([&](int64_t m) {
      SequenceBatch batch = sequences_.batch(first + (m * data.size + data.rank) * B, B);
      engine.load(m, batch.view(), m == micro_batches - 1);
    });
    engine.finish_step();
    job_.exposed().end_step();
    return 1e3 * static_cast<double>(stream.now() - stream.computed() - idle);
  }

  const Config config_;
  SimulatedBackend backend_;
  SimulatedCommunicator world_;
  RankJob job_;
  RandomSequences sequences_;
  ExposedRecord exposed_;
};

Config moe_job() {
  Config config = tiny_moe_job(4);
  config.model.num_nextn_predict_layers = 1;
  config.model.tie_word_embeddings = true;
  config.precision.compute = ComputeType::fp32;
  return config;
}

// Kinds with time on any rank.
std::set<std::string> kinds_of(const LayoutJob& job, bool is_cpu) {
  std::mutex mutex;
  std::set<std::string> kinds;
  run_rank_threads(static_cast<int>(job.shape.ranks()), [&](Communicator& world) {
    RankSteps steps(job, world, is_cpu);
    steps.run();
    const std::scoped_lock lock(mutex);
    for (size_t kind = 0; kind < kCommKinds; ++kind)
      if (steps.exposed().ms[kind].value_or(0) > 0)
        kinds.insert(kind_name(static_cast<CommKind>(kind)));
  });
  return kinds;
}

}  // namespace

TEST_CASE("ExposedTime: a device waits for what is left of a communication", "[exposed]") {
  Streams streams(/*is_cpu=*/false);
  CommPoint sent(streams.backend);
  const auto exposed_beside = [&](int64_t computing) {
    streams.exposed.begin_step();
    streams.send(CommKind::gradients, sent);
    streams.compute(computing);
    sent.wait(streams.dist(), streams.exposed, CommKind::gradients);
    streams.exposed.end_step();
    return part(streams.exposed.take(), CommKind::gradients);
  };
  CHECK(exposed_beside(0) == Milliseconds(10e3));
  CHECK(exposed_beside(3) == Milliseconds(7e3));
  CHECK(exposed_beside(12) == Milliseconds(0));
}

TEST_CASE("ExposedTime: a CPU spends its own time in each call", "[exposed]") {
  Streams streams(/*is_cpu=*/true);
  CommPoint sent(streams.backend);
  streams.exposed.begin_step();
  streams.send(CommKind::gradients, sent);
  streams.compute(30);
  sent.wait(streams.dist(), streams.exposed, CommKind::gradients);
  streams.exposed.end_step();
  CHECK(part(streams.exposed.take(), CommKind::gradients) == Milliseconds(10e3));
}

TEST_CASE("ExposedTime: kinds and steps are apart, and nothing counts between steps", "[exposed]") {
  Streams streams(/*is_cpu=*/false);
  CommPoint first(streams.backend), second(streams.backend), third(streams.backend);
  streams.exposed.begin_step();
  streams.send(CommKind::gradients, first);
  streams.send(CommKind::experts, second);
  first.wait(streams.dist(), streams.exposed, CommKind::gradients);
  second.wait(streams.dist(), streams.exposed, CommKind::experts);
  second.wait(streams.dist(), streams.exposed, CommKind::experts);  // has passed
  streams.exposed.end_step();
  streams.send(CommKind::context, third);
  third.wait(streams.dist(), streams.exposed, CommKind::context);
  streams.exposed.begin_step();
  streams.exposed.on_computing(CommKind::tensor, *streams.computing,
                               [&] { simulated(*streams.computing).communicate(); });
  streams.exposed.end_step();

  const ExposedRecord one = streams.exposed.take(), two = streams.exposed.take();
  CHECK(part(one, CommKind::gradients) == Milliseconds(10e3));
  CHECK(part(one, CommKind::experts) == Milliseconds(10e3));
  CHECK(one.total_ms() == 20e3);
  CHECK_FALSE(part(one, CommKind::context));
  CHECK_FALSE(part(one, CommKind::tensor));
  CHECK(part(two, CommKind::tensor) == Milliseconds(10e3));
  CHECK(two.total_ms() == 10e3);
  CHECK_THROWS_AS(streams.exposed.take(), RuntimeFailure);
}

TEST_CASE("ExposedTime: of three steps the first is taken before the last begins", "[exposed]") {
  Streams streams(/*is_cpu=*/false);
  for (int step = 0; step < 2; ++step) {
    streams.exposed.begin_step();
    streams.exposed.end_step();
  }
  CHECK_THROWS_AS(streams.exposed.begin_step(), RuntimeFailure);
  streams.exposed.take();
  streams.exposed.begin_step();
  streams.exposed.take();
  CHECK_THROWS_AS(streams.exposed.take(), RuntimeFailure);  // the one that has not ended
}

// Whoever lets computing wait, or communicates on its stream, without telling, breaks the sum.
TEST_CASE("ExposedTime: the time of a step is computed or exposed, in every layout", "[exposed]") {
  using Kinds = std::set<std::string>;
  const auto [shape, zero, expected] = GENERATE(table<MeshShape, int64_t, Kinds>({
      {{.data = 2}, 0, {"gradients", "results"}},
      {{.data = 2}, 1, {"gradients", "parameters", "results"}},
      {{.data = 2}, 2, {"gradients", "parameters", "results"}},
      {{.data = 2}, 3, {"gradients", "parameters", "results"}},
      {{.data = 2, .expert = 2}, 1, {"gradients", "parameters", "experts", "results"}},
      {{.tensor = 2}, 1, {"gradients", "parameters", "tensor", "results"}},
      {{.context = 2}, 1, {"gradients", "parameters", "context", "results"}},
      {{.pipeline = 2}, 0, {"gradients", "pipeline", "results"}},
      {{.pipeline = 2, .data = 2, .expert = 2},
       2,
       {"gradients", "parameters", "experts", "pipeline", "results"}},
  }));
  const bool is_cpu = GENERATE(false, true);
  CAPTURE(to_text(shape), zero, is_cpu);
  // On a device, values travel while later blocks are updated. Where layers wait for tensor
  // parallelism, too, all are there in time.
  Kinds kinds = expected;
  if (!is_cpu && shape.tensor > 1) kinds.erase("parameters");
  CHECK(kinds_of(job_at(moe_job(), shape, zero), is_cpu) == kinds);
}

TEST_CASE("ExposedTime: compressed gradients count with their compression", "[exposed]") {
  Config config = moe_job();
  config.compression.method = CompressionMethod::topk;
  const bool is_cpu = GENERATE(false, true);
  CHECK(kinds_of(job_at(config, {.data = 2}, 0), is_cpu).contains("gradients"));
}

TEST_CASE("ExposedTime: zero-bubble and interleaved pipelines leave nothing out", "[exposed]") {
  const auto schedule = GENERATE(PipelineOrder::interleaved, PipelineOrder::zero_bubble);
  const bool is_cpu = GENERATE(false, true);
  const LayoutJob job = job_at(moe_job(), {.pipeline = 2, .data = 2}, 2, schedule);
  CHECK(kinds_of(job, is_cpu).contains("pipeline"));
}

TEST_CASE("ExposedTime: a rank that is alone waits for nobody", "[exposed]") {
  CHECK(kinds_of(job_at(moe_job(), {}, 1), /*is_cpu=*/GENERATE(false, true)).empty());
}

}  // namespace dstrain::test
