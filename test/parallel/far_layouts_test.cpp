// Layouts on memory that the host cannot reach: ranks whose tensors travel through the host have
// the bits of ranks on CPUs. Whoever in parallel/ reads device memory directly crashes here.
#include "test/support/catch.h"
#include "test/support/copied_communicator.h"
#include "test/support/far_backend.h"
#include "test/support/layout_jobs.h"

namespace dstrain::test {
namespace {

Config moe_job() {
  Config config = tiny_moe_job(4);
  config.model.num_nextn_predict_layers = 1;
  config.model.tie_word_embeddings = true;
  config.optimizer.grad_clip = 0.1;
  config.precision.compute = ComputeType::fp32;  // as on the CPUs
  return config;
}

LayoutRunOptions on_far_ranks() {
  LayoutRunOptions options;
  options.steps = 2;
  options.make_backend = [](int) { return std::make_unique<FarBackend>(); };
  options.make_device_ranks = [](Communicator& ranks, Backend& backend) {
    return std::make_unique<CopiedCommunicator>(ranks, backend, MemoryKind::host);
  };
  return options;
}

}  // namespace

TEST_CASE("far ranks: every axis has the bits of ranks on CPUs", "[layouts]") {
  const auto [shape, zero] = GENERATE(table<MeshShape, int64_t>({
      {{.data = 2}, 0},
      {{.data = 2, .expert = 2}, 1},
      {{.data = 2}, 3},
      {{.tensor = 2}, 1},
      {{.context = 2}, 1},
      {{.pipeline = 2}, 1},
      {{.pipeline = 2, .data = 2, .expert = 2}, 2},
  }));
  CAPTURE(to_text(shape), zero);
  const Config config = job_at(moe_job(), shape, zero).config;
  LayoutRunOptions on_cpus;
  on_cpus.steps = 2;
  const LayoutRun expected = run_layout(config, shape, on_cpus);
  CHECK(bit_difference(expected, run_layout(config, shape, on_far_ranks())) == "");
}

TEST_CASE("far ranks: further rounds of crowded experts have the bits of ranks on CPUs",
          "[layouts]") {
  Config config = moe_job();
  config.parallel.expert_buffer = 1.0;
  config.model.bias_update_speed = 0;
  const MeshShape shape{.data = 2, .expert = 2};
  config = job_at(config, shape, 1).config;
  LayoutRunOptions on_cpus;
  on_cpus.steps = 2;
  CHECK(bit_difference(run_layout(config, shape, on_cpus),
                       run_layout(config, shape, on_far_ranks())) == "");
}

TEST_CASE("far ranks: compressed gradients have the bits of ranks on CPUs", "[layouts]") {
  const CompressionMethod method = GENERATE(CompressionMethod::topk, CompressionMethod::int8);
  const int64_t zero = GENERATE(0, 1);
  Config config = moe_job();
  config.compression.method = method;
  const MeshShape shape{.data = 2};
  config = job_at(config, shape, zero).config;
  LayoutRunOptions on_cpus;
  on_cpus.steps = 3;
  LayoutRunOptions far = on_far_ranks();
  far.steps = 3;
  CHECK(bit_difference(run_layout(config, shape, on_cpus), run_layout(config, shape, far)) == "");
}

TEST_CASE("far ranks: compression.method auto measures memory that the host cannot reach",
          "[layouts]") {
  Config config = moe_job();
  config.compression.method = CompressionMethod::automatic;
  const MeshShape shape{.data = 2, .expert = 2};
  config = job_at(config, shape, GENERATE(0, 1)).config;
  LayoutRunOptions far = on_far_ranks();
  far.steps = 2;
  const LayoutRun run = run_layout(config, shape, far);
  CHECK(run.disagreement == "");
  CHECK(run.steps.size() == 2);
}

}  // namespace dstrain::test
