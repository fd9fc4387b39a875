// Whole training steps through the kernels of cuda/, on streams that run as late as they may,
// beside the CPU back end.
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "parallel/thread_communicator.h"
#include "test/support/catch.h"
#include "test/support/copied_communicator.h"
#include "test/support/cuda_device.h"
#include "test/support/cuda_on_cpu/cudnn_attention.h"
#include "test/support/cuda_on_cpu/streams.h"
#include "test/support/layout_jobs.h"
#include "test/support/tiny_model.h"
#include "test/support/trainer_rank.h"

namespace dstrain::test {
namespace {

using cuda_on_cpu::Order;
using cuda_on_cpu::skipped_without_cudnn;
using cuda_on_cpu::take_cudnn_attention_requests;

// Three micro-batches a step of packed documents; clipping is active.
Config job_of(ModelConfig model, Recompute recompute = Recompute::none) {
  Config config;
  config.model = std::move(model);
  config.data.seq_len = 20;
  config.train.global_batch = 3;
  config.train.micro_batch = 1;
  config.train.recompute = recompute;
  config.optimizer.lr = 1e-3;
  config.optimizer.grad_clip = 0.5;
  config.precision.compute = ComputeType::fp32;
  return config;
}

ModelConfig with_bias_updates(ModelConfig model) {
  model.bias_update_speed = 0.01;
  return model;
}

LayoutRunOptions on_gpu(LayoutRunOptions options) {
  options.make_backend = [](int) { return make_gpu_backend(0); };
  options.make_device_ranks = [](Communicator& ranks, Backend& backend) {
    return std::make_unique<CopiedCommunicator>(ranks, backend, MemoryKind::host);
  };
  return options;
}

// --- beside the CPU back end

void check_fp32(const Config& config) {
  const LayoutReference cpu(config, 3);
  for (const StepResult& step : cpu.run.steps) REQUIRE(step.grad_norm > config.optimizer.grad_clip);
  LayoutTolerances tolerances;
  tolerances.gradient = 1e-4;
  tolerances.loss = 1e-5;
  const LayoutRun gpu = run_layout(config, {}, on_gpu(replay_options(cpu)));
  CHECK(failures(compare_layouts(config, cpu.run, gpu, tolerances)) == "");
}

double relative_difference(const std::map<std::string, std::vector<double>>& a,
                           const std::map<std::string, std::vector<double>>& b) {
  double difference = 0, size = 0;
  for (const auto& [name, values] : b) {
    for (size_t i = 0; i < values.size(); ++i) {
      difference += std::pow(a.at(name).at(i) - values[i], 2);
      size += std::pow(values[i], 2);
    }
  }
  return std::sqrt(difference / size);
}

void check_bf16(Config config, const MeshShape& shape = {}) {
  const LayoutReference cpu(config, 1);
  config = job_at(config, shape, /*zero=*/1).config;
  config.precision.compute = ComputeType::bf16;
  const LayoutRun gpu = run_layout(config, shape, on_gpu(replay_options(cpu)));
  CHECK(relative_difference(gradients_of(config, gpu), gradients_of(config, cpu.run)) < 0.05);
  CHECK(gpu.steps[0].loss == Approx(cpu.run.steps[0].loss).epsilon(1e-2));
}

// --- in other orders of streams

// With a copy of the state beside the second of three steps, and an evaluation. Waits of the first
// rank's streams can be left out; how many it made is told.
struct Training {
  std::vector<TrainerRun> ranks;
  int64_t waits = 0;
};
Training train(const Config& config, const MeshShape& shape, Order order,
               const std::set<int64_t>& left_out = {}) {
  cuda_on_cpu::set_order(order);
  Training training;
  training.ranks.resize(static_cast<size_t>(shape.ranks()));
  run_rank_threads(static_cast<int>(shape.ranks()), [&](Communicator& world) {
    const bool is_first = world.rank() == 0;
    cuda_on_cpu::leave_out_waits(is_first ? left_out : std::set<int64_t>{});
    const std::unique_ptr<Backend> backend = make_gpu_backend(0);
    CopiedCommunicator ranks(world, *backend, MemoryKind::host);
    training.ranks[static_cast<size_t>(world.rank())] =
        TrainerRank(config, shape, ranks, *backend, "one").run();
    if (is_first) training.waits = cuda_on_cpu::waits_made();
  });
  cuda_on_cpu::set_order(Order::late);
  return training;
}

bool same_bits(double a, double b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// "" or what of two runs is not the same to the bit.
std::string difference(const Training& a, const Training& b) {
  for (size_t rank = 0; rank < a.ranks.size(); ++rank) {
    const TrainerRun &x = a.ranks[rank], &y = b.ranks[rank];
    for (size_t i = 0; i < x.steps.size(); ++i)
      if (!same_bits(x.steps[i].loss, y.steps[i].loss) ||
          !same_bits(x.steps[i].grad_norm, y.steps[i].grad_norm) ||
          x.steps[i].expert_counts_LE != y.steps[i].expert_counts_LE)
        return "step " + std::to_string(i);
    if (!same_bits(x.evaluation, y.evaluation)) return "the evaluation";
    if (x.snapshot != y.snapshot) return "the snapshot";
  }
  return "";
}

void check_orders(const Config& config, const MeshShape& shape) {
  const Training late = train(config, shape, Order::late);
  CHECK(difference(late, train(config, shape, Order::oldest_first)) == "");
  CHECK(difference(late, train(config, shape, Order::youngest_first)) == "");
}

// Whether some order of streams shows that the wait is not made.
bool is_noticed(const Config& config, const MeshShape& shape, const Training& right, int64_t wait) {
  for (const Order order : {Order::late, Order::youngest_first, Order::oldest_first})
    if (difference(right, train(config, shape, order, {wait})) != "") return true;
  return false;
}

}  // namespace

TEST_CASE("cuda on cpu: trains as the CPU does: latent attention and experts",
          "[cuda_on_cpu][training]") {
  check_fp32(job_of(with_bias_updates(tiny_moe()), Recompute::selective));
}

TEST_CASE("cuda on cpu: trains as the CPU does: softmax router, YaRN", "[cuda_on_cpu][training]") {
  check_fp32(job_of(tiny_v2()));
}

TEST_CASE("cuda on cpu: trains as the CPU does: grouped queries, biases, tied head",
          "[cuda_on_cpu][training]") {
  check_fp32(job_of(tiny_dense()));
}

TEST_CASE("cuda on cpu: trains as the CPU does: multi-token prediction",
          "[cuda_on_cpu][training]") {
  check_fp32(job_of(tiny_mtp(), Recompute::full));
}

TEST_CASE("cuda on cpu: a step in bf16 is near one in f32", "[cuda_on_cpu][training]") {
  check_bf16(job_of(tiny_moe()));
  check_bf16(job_of(tiny_dense()));
}

// Documents of a rank's own rows, and those that it shares with the other one.
TEST_CASE("cuda on cpu: a step in bf16 with cuDNN's attention is near one in f32",
          "[cudnn][training]") {
  if (skipped_without_cudnn()) return;
  ModelConfig moe = tiny_moe(), dense = tiny_dense();
  moe.qk_nope_head_dim = moe.qk_rope_head_dim = moe.v_head_dim = dense.head_dim = 8;
  for (const ModelConfig& model : {moe, dense})
    for (const int context : {1, 2}) {
      CAPTURE(model.num_attention_heads, context);
      take_cudnn_attention_requests();
      check_bf16(job_of(model), {.context = context});
      std::set<std::pair<bool, bool>> kinds;
      for (const CudnnAttentionShape& run : take_cudnn_attention_requests().runs)
        if (run.ragged) kinds.emplace(run.backward, run.causal);
      CHECK(kinds.size() == (context == 1 ? 2 : 4));
    }
}

TEST_CASE("cuda on cpu: training has the same bits in every order of streams",
          "[cuda_on_cpu][training]") {
  Config config = job_of(with_bias_updates(tiny_moe()));
  config.model.num_hidden_layers = 1;
  config.precision.compute = ComputeType::bf16;
  check_orders(config, {});
}

TEST_CASE("cuda on cpu: ranks train with the same bits in every order of streams",
          "[cuda_on_cpu][training]") {
  Config config = job_of(with_bias_updates(tiny_moe()));
  config.model.num_hidden_layers = 1;
  config.train.global_batch = 4;
  const MeshShape shape{.data = 2, .expert = 2};
  check_orders(job_at(config, shape, /*zero=*/2).config, shape);
}

TEST_CASE("cuda on cpu: a wait of a stream that is left out shows in training",
          "[cuda_on_cpu][training]") {
  Config config = job_of(tiny_dense());
  config.model.num_hidden_layers = 1;
  const Training right = train(config, {}, Order::late);
  REQUIRE(right.waits > 2);
  for (int64_t wait = 0; wait < right.waits; ++wait) {
    CAPTURE(wait, right.waits);
    CHECK(is_noticed(config, {}, right, wait));
  }
}

}  // namespace dstrain::test
