// Ranks that exchange data through NCCL, on a machine without GPUs: parallel/nccl_*.cpp over
// stand-ins of the CUDA runtime and of NCCL, on streams that run beside each other.
#include <atomic>
#include <chrono>
#include <utility>

#include "core/backend/cpu_backend.h"
#include "core/base/error.h"
#include "parallel/nccl_communicator.h"
#include "test/support/catch.h"
#include "test/support/communicator_check.h"
#include "test/support/copied_communicator.h"
#include "test/support/layout_jobs.h"
#include "test/support/nccl_on_cpu/async_backend.h"
#include "test/support/nccl_on_cpu/faults.h"
#include "test/support/nccl_on_cpu/queue.h"
#include "test/support/trainer_rank.h"

namespace dstrain::test {
namespace {

struct GpuRank {
  Communicator& host;
  Communicator& device;
  Backend& backend;
  Stream& stream;
};

void run_gpu_ranks(int ranks, const std::function<void(GpuRank&)>& body,
                   const NcclOptions& options = {}) {
  run_ranks(ranks, [&](RankContext& context) {
    AsyncBackend backend(context.world.rank());
    const std::unique_ptr<Stream> stream = backend.make_stream();
    const auto device = make_nccl_communicator(context.world, backend, options);
    GpuRank rank{context.world, *device, backend, *stream};
    body(rank);
  });
}

LayoutRunOptions on_gpus(int64_t steps) {
  LayoutRunOptions options;
  options.steps = steps;
  options.make_backend = [](int rank) { return std::make_unique<AsyncBackend>(rank); };
  options.make_device_ranks = [](Communicator& ranks, Backend& backend) {
    return make_nccl_communicator(ranks, backend);
  };
  return options;
}

Config in_fp32(Config config) {
  config.precision.compute = ComputeType::fp32;
  return config;
}

// "" if ranks over NCCL have the bits of ranks on host memory.
std::string difference(const LayoutJob& job, int64_t steps = 2, int nodes = 1) {
  LayoutRunOptions on_cpus;
  on_cpus.steps = steps;
  on_cpus.nodes = nodes;
  LayoutRunOptions over_nccl = on_gpus(steps);
  over_nccl.nodes = nodes;
  const Config config = in_fp32(job.config);
  const LayoutRun expected = run_layout(config, job.shape, on_cpus);
  const LayoutRun run = run_layout(config, job.shape, over_nccl);
  return run.disagreement.empty() ? bit_difference(expected, run) : run.disagreement;
}

// What the ranks of a job see, by rank.
struct Seen {
  std::vector<double> losses;
  double evaluation = 0;
  std::vector<std::vector<char>> snapshot;
  bool operator==(const Seen&) const = default;
};
std::vector<Seen> run_trainers(const Config& config, const MeshShape& shape, bool over_nccl) {
  std::vector<Seen> all(static_cast<size_t>(shape.ranks()));
  run_ranks(static_cast<int>(shape.ranks()), [&](RankContext& context) {
    const std::unique_ptr<Backend> backend =
        over_nccl ? std::make_unique<AsyncBackend>(context.world.rank())
                  : std::unique_ptr<Backend>(make_cpu_backend(1));
    const std::unique_ptr<Communicator> device =
        over_nccl ? make_nccl_communicator(context.world, *backend) : nullptr;
    TrainerRank rank(config, shape, device ? *device : context.world, *backend, "one machine");
    TrainerRun run = rank.run();
    Seen& seen = all[static_cast<size_t>(context.world.rank())];
    for (const StepResult& step : run.steps)
      for (const double value : {step.loss, step.mtp_loss, step.balance_loss, step.grad_norm})
        seen.losses.push_back(value);
    seen.evaluation = run.evaluation;
    seen.snapshot = std::move(run.snapshot);
  });
  return all;
}

}  // namespace

TEST_CASE("nccl on the CPU: every call gives the serial result, bit for bit", "[nccl_on_cpu]") {
  run_gpu_ranks(GENERATE(1, 2, 4), [](GpuRank& rank) {
    CopiedCommunicator uploaded(rank.device, rank.backend, MemoryKind::device);
    RankContext context{uploaded, rank.backend, rank.stream};
    if (rank.device.size() <= 2) check_reductions(context);  // bf16 is rounded at every rank
    check_exchanges(context);
    check_messages(context);
    check_splits(context);
    check_bytes_sent(context);
  });
}

TEST_CASE("nccl on the CPU: every layout has the bits of ranks on CPUs", "[nccl_on_cpu]") {
  const TinyModel model = GENERATE(TinyModel::moe, TinyModel::dense);
  const int ranks = GENERATE(2, 4);
  for (const LayoutJob& job : layouts_in_turn(model, ranks)) {
    CAPTURE(to_text(job));
    CHECK(difference(job) == "");
  }
}

TEST_CASE("nccl on the CPU: every layout of 8 ranks has the bits of ranks on CPUs",
          "[nccl_on_cpu][large]") {
  const TinyModel model = GENERATE(TinyModel::moe, TinyModel::dense);
  nccl_on_cpu::share_hardware_queues(GENERATE(false, true));
  for (const LayoutJob& job : layouts_in_turn(model, 8)) {
    CAPTURE(to_text(job));
    CHECK(difference(job) == "");
  }
  nccl_on_cpu::share_hardware_queues(false);
}

TEST_CASE("nccl on the CPU: the trainer's order of calls, with all that a job can ask for",
          "[nccl_on_cpu]") {
  const auto [shape, zero] = GENERATE(table<MeshShape, int64_t>({
      {{.data = 2}, 1},
      {{.data = 2}, 3},
      {{.data = 2, .expert = 2}, 2},
      {{.tensor = 2}, 1},
      {{.context = 4}, 1},
      {{.pipeline = 2, .data = 2, .expert = 2}, 2},
      {{.data = 2, .context = 2, .tensor = 2, .expert = 4}, 1},
  }));
  const Recompute recompute = GENERATE(Recompute::none, Recompute::full);
  CAPTURE(to_text(shape), zero, static_cast<int>(recompute));
  Config config = in_fp32(tiny_moe_job(4));
  config.model.num_nextn_predict_layers = 1;
  config.model.tie_word_embeddings = true;
  config.optimizer.grad_clip = 0.1;
  config.train.recompute = recompute;
  config = job_at(config, shape, zero).config;
  CHECK(run_trainers(config, shape, true) == run_trainers(config, shape, false));
}

TEST_CASE("nccl on the CPU: streams that do not wait for each other give other bits",
          "[nccl_on_cpu]") {
  const LayoutJob job = job_at(in_fp32(tiny_moe_job(4)), {.data = 2}, 2);
  LayoutRunOptions options;
  options.steps = 2;
  const LayoutRun expected = run_layout(job.config, job.shape, options);
  options = on_gpus(2);
  options.make_backend = [](int rank) {
    return std::make_unique<AsyncBackend>(rank, AsyncBackend::Waits::no);
  };
  const LayoutRun run = run_layout(job.config, job.shape, options);
  CHECK((!run.disagreement.empty() || bit_difference(expected, run) != ""));
}

TEST_CASE("nccl on the CPU: further rounds of crowded experts", "[nccl_on_cpu]") {
  Config config = tiny_moe_job(4);
  config.parallel.expert_buffer = 1.0;
  config.model.bias_update_speed = 0;
  const MeshShape shape{.data = 4, .expert = 4};
  CHECK(difference(job_at(config, shape, 1)) == "");
}

TEST_CASE("nccl on the CPU: compressed gradients, on one machine and between two",
          "[nccl_on_cpu]") {
  const auto method = GENERATE(CompressionMethod::topk, CompressionMethod::int8);
  const int64_t zero = GENERATE(0, 1, 2);
  const int nodes = GENERATE(1, 2);
  CAPTURE(enum_name(method), zero, nodes);
  Config config = tiny_moe_job(4);
  config.compression.method = method;
  if (nodes > 1) config.compression.scope = CompressionScope::inter_node;
  CHECK(difference(job_at(config, {.data = 4}, zero), 3, nodes) == "");
}

TEST_CASE("nccl on the CPU: gradients that travel in bf16", "[nccl_on_cpu]") {
  const int64_t zero = GENERATE(0, 1, 2, 3);
  CAPTURE(zero);
  Config config = tiny_moe_job(4);
  config.precision.reduce = ReduceType::bf16;
  CHECK(difference(job_at(config, {.data = 2}, zero)) == "");
}

// What waits for a neighbour to receive must not hold up what that one waits for, even where
// streams share a hardware queue (parallel/nccl_messages.h).
TEST_CASE("nccl on the CPU: layouts do not lock up where all streams share a hardware queue",
          "[nccl_on_cpu]") {
  nccl_on_cpu::share_hardware_queues(true);
  const TinyModel model = GENERATE(TinyModel::moe, TinyModel::dense);
  const int ranks = GENERATE(2, 4);
  for (const LayoutJob& job : layouts_in_turn(model, ranks)) {
    if (ranks > 2 && job.shape.pipeline == 1) continue;  // messages are what waits for long
    CAPTURE(to_text(job));
    CHECK(difference(job) == "");
  }
  nccl_on_cpu::share_hardware_queues(false);
}

// Where NCCL says that another rank is gone, everybody gets to know it, and nobody waits.
TEST_CASE("nccl on the CPU: a rank that is gone ends the others' steps", "[nccl_on_cpu]") {
  std::atomic<int> told = 0;
  run_gpu_ranks(2, [&](GpuRank& rank) {
    const DeviceMemory memory(rank.backend, 64, MemoryKind::device);
    const Tensor x(memory.data(), DType::f32, {16});
    rank.backend.ops().fill(rank.stream, x, 1);
    nccl_on_cpu::fail_after(3);
    try {
      for (int i = 0; i < 10; ++i) rank.device.all_reduce_sum(rank.stream, x);
    } catch (const PeerFailure& failure) {
      const std::string text = failure.what();
      rank_check(text.find("all_reduce_sum of ranks 0, 1") != std::string::npos, text);
      ++told;
    }
    rank.stream.synchronize();
    // Later calls say the same.
    try {
      rank.device.all_reduce_sum(rank.stream, x);
    } catch (const PeerFailure&) {
      ++told;
    }
    nccl_on_cpu::fail_after(-1);
  });
  CHECK(told == 4);
}

TEST_CASE("nccl on the CPU: ranks that do not connect in time are named", "[nccl_on_cpu]") {
  NcclOptions options;
  options.timeout = std::chrono::milliseconds(200);
  std::atomic<int> told = 0;
  run_gpu_ranks(
      2,
      [&](GpuRank& rank) {
        if (rank.device.rank() == 1) return;
        try {
          rank.device.prepare(Connections::exchanges);
        } catch (const RuntimeFailure& failure) {
          const std::string text = failure.what();
          rank_check(text.find("did not end the first exchange of ranks 0, 1 within 0.2 s") !=
                         std::string::npos,
                     text);
          ++told;
        }
      },
      options);
  CHECK(told == 1);
}

}  // namespace dstrain::test
