// Layouts on processes that have a GPU each and exchange data through NCCL, against one GPU.
// Skipped where there are not enough.
#include <cmath>

#include "parallel/nccl_communicator.h"
#include "test/support/catch.h"
#include "test/support/cuda_device.h"
#include "test/support/layout_jobs.h"
#include "test/support/mpi_ranks.h"

namespace dstrain::test {
namespace {

constexpr int64_t kSteps = 5;

// The rank that a process is, whatever the number that a run of its own gives it.
std::function<std::unique_ptr<Backend>(int)> own_gpu(const Communicator& world) {
  return [rank = world.rank()](int) { return make_rank_backend(rank); };
}

LayoutRunOptions on_gpus(const Communicator& world, LayoutRunOptions options) {
  options.make_backend = own_gpu(world);
  options.make_device_ranks = [](Communicator& ranks, Backend& backend) {
    return make_nccl_communicator(ranks, backend);
  };
  return options;
}

void run_on_gpus(const RankBody& body) {
  run_mpi_rank(
      [&](RankContext& rank) {
        std::string missing = why_gpus_missing(rank.world.size());
        if (missing.empty()) missing = why_no_nccl();
        if (missing.empty()) return body(rank);
        if (rank.world.rank() == 0) print_skipped("no GPU for each rank: " + missing);
      },
      {.timeout = std::chrono::minutes(2)});
}

Config with_precision(Config config, ComputeType compute) {
  config.precision.compute = compute;
  return config;
}

// Every legal layout; of data parallelism all ZeRO stages.
std::vector<LayoutJob> layouts(TinyModel model, int ranks) {
  std::vector<LayoutJob> jobs = layouts_in_turn(model, ranks);
  for (const int64_t zero : {0, 1, 2, 3})
    jobs.push_back(job_at(jobs.front().config, {.data = ranks}, zero));
  return jobs;
}

// In bf16, one layout for each axis that all ranks share, with ZeRO 2.
std::vector<LayoutJob> bf16_layouts(int ranks) {
  std::vector<LayoutJob> jobs;
  for (const MeshShape& shape :
       {MeshShape{.data = ranks, .expert = ranks}, MeshShape{.tensor = ranks},
        MeshShape{.context = ranks}, MeshShape{.pipeline = ranks}}) {
    const Config job = tiny_moe_job(layers_for(shape, PipelineOrder::one_f_one_b));
    jobs.push_back(job_at(with_precision(job, ComputeType::bf16), shape, 2));
  }
  return jobs;
}

// Relative, the worst of all steps; infinite where one is not finite.
double loss_difference(const LayoutRun& a, const LayoutRun& b) {
  double worst = 0;
  for (size_t s = 0; s < a.steps.size(); ++s) {
    const double difference = std::abs(a.steps[s].loss - b.steps[s].loss) / a.steps[s].loss;
    worst = std::isfinite(difference) ? std::max(worst, difference) : INFINITY;
  }
  return worst;
}

void check_layouts(TinyModel model) {
  run_on_gpus([&](RankContext& rank) {
    for (const LayoutJob& layout : layouts(model, rank.world.size())) {
      INFO(to_text(layout));
      const Config config = with_precision(layout.config, ComputeType::fp32);
      const LayoutReference reference(config, kSteps, {}, own_gpu(rank.world));
      const LayoutRun run = run_layout_on(rank.world, config, layout.shape,
                                          on_gpus(rank.world, replay_options(reference)));
      CHECK(failures(compare_layouts(config, reference.run, run)) == "");
    }
  });
}

}  // namespace

TEST_CASE("layouts: GPUs train a mixture of experts as one GPU does", "[ranks2][ranks4]") {
  check_layouts(TinyModel::moe);
}

TEST_CASE("layouts: GPUs train a dense model as one GPU does", "[ranks2][ranks4]") {
  check_layouts(TinyModel::dense);
}

TEST_CASE("layouts: GPUs in bf16 stay near one GPU", "[ranks2][ranks4]") {
  run_on_gpus([](RankContext& rank) {
    for (const LayoutJob& layout : bf16_layouts(rank.world.size())) {
      INFO(to_text(layout));
      const LayoutReference reference(layout.config, kSteps, {}, own_gpu(rank.world));
      const LayoutRun run = run_layout_on(rank.world, layout.config, layout.shape,
                                          on_gpus(rank.world, replay_options(reference)));
      CHECK(run.disagreement == "");
      CHECK(loss_difference(reference.run, run) < 5e-3);
    }
  });
}

TEST_CASE("layouts: GPUs with compressed gradients stay near ranks on CPUs", "[ranks2][ranks4]") {
  run_on_gpus([](RankContext& rank) {
    const MeshShape shape{.data = rank.world.size()};
    for (const CompressionMethod method : {CompressionMethod::topk, CompressionMethod::int8})
      for (const int64_t zero : {0, 1, 2}) {
        Config config =
            with_precision(job_at(tiny_moe_job(4), shape, zero).config, ComputeType::fp32);
        config.compression.method = method;
        INFO(enum_name(method) << ", zero " << zero);
        LayoutRunOptions options;
        options.steps = kSteps;
        const LayoutRun cpus = run_layout(config, shape, options);
        const LayoutRun run =
            run_layout_on(rank.world, config, shape, on_gpus(rank.world, options));
        CHECK(run.disagreement == "");
        CHECK(loss_difference(cpus, run) < 1e-4);
        CHECK(run.traffic.reduce.sent == cpus.traffic.reduce.sent);
      }
  });
}

TEST_CASE("layouts: the same run on GPUs gives the same bits", "[ranks2][ranks4]") {
  run_on_gpus([](RankContext& rank) {
    LayoutRunOptions options = on_gpus(rank.world, {});
    options.steps = kSteps;
    for (const LayoutJob& layout : bf16_layouts(rank.world.size())) {
      INFO(to_text(layout));
      const LayoutRun first = run_layout_on(rank.world, layout.config, layout.shape, options);
      const LayoutRun again = run_layout_on(rank.world, layout.config, layout.shape, options);
      CHECK(bit_difference(first, again) == "");
    }
  });
}

}  // namespace dstrain::test
