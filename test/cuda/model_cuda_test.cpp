// Training on the GPU against training on the CPU: whole models, packed documents, three
// micro-batches a step, clipping active.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "cuda/cuda_backend.h"
#include "test/support/catch.h"
#include "test/support/copied_communicator.h"
#include "test/support/cuda_device.h"
#include "test/support/layout_jobs.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

Config job_of(ModelConfig model, Recompute recompute) {
  Config config;
  config.model = std::move(model);
  config.data.seq_len = 32;
  config.train.global_batch = 6;
  config.train.micro_batch = 2;
  config.train.recompute = recompute;
  config.optimizer.lr = 1e-3;
  config.optimizer.grad_clip = 0.5;
  config.precision.compute = ComputeType::fp32;
  return config;
}

// Widths as fast kernels want them: heads of DeepSeek's size, experts of whole tiles.
ModelConfig wide_moe() {
  ModelConfig m = tiny_moe_job(3).model;
  m.vocab_size = 256;
  m.hidden_size = 256;
  m.intermediate_size = 512;
  m.moe_intermediate_size = 128;
  m.num_attention_heads = 2;
  m.q_lora_rank = 0;
  m.kv_lora_rank = 128;
  m.qk_nope_head_dim = 128;
  m.qk_rope_head_dim = 64;
  m.v_head_dim = 128;
  m.initializer_range = 0.02;
  m.aux_loss_alpha = 0.001;
  m.bias_update_speed = 0.001;
  return m;
}

ModelConfig wide_dense() {
  ModelConfig m = tiny_dense_job(3).model;
  m.vocab_size = 256;
  m.hidden_size = 256;
  m.intermediate_size = 512;
  m.num_attention_heads = 4;
  m.num_key_value_heads = 2;
  m.head_dim = 64;
  m.initializer_range = 0.02;
  return m;
}

// Most tokens follow from the one before, so that there is something to learn.
void make_learnable(int64_t vocab, SequenceBatch& batch) {
  for (size_t t = 0; t + 1 < batch.tokens_T.size(); ++t) {
    if (batch.targets_T[t] < 0) continue;
    const int64_t random = batch.tokens_T[t + 1];
    const int64_t next = random % 4 == 0 ? random : (5 * int64_t{batch.tokens_T[t]} + 3) % vocab;
    batch.targets_T[t] = batch.tokens_T[t + 1] = static_cast<int32_t>(next);
  }
}

LayoutRunOptions on_gpu(LayoutRunOptions options, bool deterministic = false) {
  options.make_backend = [deterministic](int) {
    CudaOptions cuda;
    cuda.deterministic = deterministic;
    return make_cuda_backend(cuda);
  };
  return options;
}

// The first steps of a run; its state is not theirs.
LayoutRun first_steps(LayoutRun run, size_t steps) {
  run.steps.resize(steps);
  return run;
}

// Runs 50 steps on the CPU, and 20 and 50 on the GPU with the same routing.
void check_against_cpu(const Config& config) {
  const LayoutReference cpu(config, 50);
  for (const StepResult& step : cpu.run.steps) REQUIRE(step.grad_norm > config.optimizer.grad_clip);
  for (const int64_t steps : {20, 50}) {
    INFO(steps << " steps");
    LayoutRunOptions options = on_gpu(replay_options(cpu));
    options.steps = steps;
    options.timeout = std::chrono::minutes(2);
    const LayoutRun gpu = run_layout(config, {}, options);
    LayoutTolerances tolerances;
    tolerances.gradient = 1e-4;
    tolerances.loss = steps == 20 ? 1e-5 : 1e-4;
    tolerances.margin = steps == 20 ? 1e-5 : 1e-4;
    tolerances.parameter = steps == 20 ? std::numeric_limits<double>::infinity() : 5e-2;
    const LayoutRun reference = first_steps(cpu.run, static_cast<size_t>(steps));
    CHECK(failures(compare_layouts(config, reference, gpu, tolerances)) == "");
  }
}

TEST_CASE("cuda: trains as the CPU does: latent attention and experts", "[cuda]") {
  if (skipped_without_gpu()) return;
  check_against_cpu(job_of(tiny_moe_job(4).model, Recompute::none));
}

TEST_CASE("cuda: trains as the CPU does: experts, all recomputed", "[cuda]") {
  if (skipped_without_gpu()) return;
  check_against_cpu(job_of(tiny_moe_job(4).model, Recompute::full));
}

TEST_CASE("cuda: trains as the CPU does: experts, odd sizes, selectively recomputed", "[cuda]") {
  if (skipped_without_gpu()) return;
  check_against_cpu(job_of(tiny_moe(), Recompute::selective));
}

TEST_CASE("cuda: trains as the CPU does: softmax router, YaRN, odd sizes", "[cuda]") {
  if (skipped_without_gpu()) return;
  check_against_cpu(job_of(tiny_v2(), Recompute::none));
}

TEST_CASE("cuda: trains as the CPU does: grouped queries, biases, tied head, odd sizes", "[cuda]") {
  if (skipped_without_gpu()) return;
  check_against_cpu(job_of(tiny_dense(), Recompute::selective));
}

TEST_CASE("cuda: trains as the CPU does: multi-token prediction", "[cuda]") {
  if (skipped_without_gpu()) return;
  check_against_cpu(job_of(tiny_mtp(), Recompute::full));
}

// --- ranks

// Ranks that share one GPU, and exchange tensors through the host: what they compute is what ranks
// with a GPU each do.
LayoutRunOptions on_shared_gpu(LayoutRunOptions options) {
  options = on_gpu(std::move(options));
  options.make_device_ranks = [](Communicator& ranks, Backend& backend) {
    return std::make_unique<CopiedCommunicator>(ranks, backend, MemoryKind::host);
  };
  options.timeout = std::chrono::minutes(2);
  return options;
}

TEST_CASE("cuda: ranks train as one rank on the CPU does", "[cuda]") {
  if (skipped_without_gpu()) return;
  Config config = tiny_moe_job(4);
  config.optimizer.grad_clip = 0.5;
  config.precision.compute = ComputeType::fp32;
  const LayoutReference cpu(config, 20);
  const auto [shape, zero] = GENERATE(table<MeshShape, int64_t>({
      {{.data = 2}, 0},
      {{.data = 2}, 1},
      {{.data = 2}, 2},
      {{.data = 2}, 3},
      {{.data = 2, .expert = 2}, 1},
      {{.tensor = 2}, 1},
      {{.context = 2}, 1},
      {{.pipeline = 2}, 1},
      {{.data = 2, .tensor = 2, .expert = 4}, 2},
  }));
  CAPTURE(to_text(shape), zero);
  const LayoutJob job = job_at(config, shape, zero);
  LayoutTolerances tolerances;
  tolerances.gradient = 1e-4;
  tolerances.loss = 1e-5;
  tolerances.parameter = std::numeric_limits<double>::infinity();
  const LayoutRun gpu = run_layout(job.config, shape, on_shared_gpu(replay_options(cpu)));
  CHECK(failures(compare_layouts(config, cpu.run, gpu, tolerances)) == "");
}

TEST_CASE("cuda: compressed gradients of ranks train as on the CPU", "[cuda]") {
  if (skipped_without_gpu()) return;
  const CompressionMethod method = GENERATE(CompressionMethod::topk, CompressionMethod::int8);
  Config config = tiny_dense_job(4);
  config.precision.compute = ComputeType::fp32;
  config.compression.method = method;
  const MeshShape shape{.data = 2};
  config = job_at(config, shape, 1).config;
  LayoutRunOptions options;
  options.steps = 5;
  const LayoutRun cpu = run_layout(config, shape, options),
                  gpu = run_layout(config, shape, on_shared_gpu(options));
  for (size_t s = 0; s < cpu.steps.size(); ++s)
    CHECK(gpu.steps[s].loss == Approx(cpu.steps[s].loss).epsilon(1e-4));
  CHECK(gpu.traffic.reduce.sent == cpu.traffic.reduce.sent);
}

// --- bf16

std::vector<double> flat(const std::map<std::string, std::vector<double>>& gradients) {
  std::vector<double> all;
  for (const auto& [name, g] : gradients) all.insert(all.end(), g.begin(), g.end());
  return all;
}

double relative_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b.at(i)) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(difference / size);
}

// 200 steps in both types on the GPU, each with its own routing.
void check_bf16(ModelConfig model) {
  Config fp32 = job_of(std::move(model), Recompute::none);
  fp32.data.seq_len = 128;
  fp32.optimizer.lr = 3e-4;
  Config bf16 = fp32;
  bf16.precision.compute = ComputeType::bf16;
  LayoutRunOptions options = on_gpu({});
  options.steps = 200;
  options.fault.edit_batch = [&](const RankPlace&, int64_t, SequenceBatch& batch) {
    make_learnable(fp32.model.vocab_size, batch);
  };
  const LayoutRun exact = run_layout(fp32, {}, options), narrow = run_layout(bf16, {}, options);

  const double gradients =
      relative_difference(flat(gradients_of(bf16, narrow)), flat(gradients_of(fp32, exact)));
  WARN("gradients of the first step in bf16: relative L2 error " << gradients);
  CHECK(gradients < 0.05);
  double last_fifth = 0, largest = 0;
  for (size_t s = 0; s < exact.steps.size(); ++s) {
    const double difference = narrow.steps[s].loss - exact.steps[s].loss;
    if (s >= 160) last_fifth += difference / 40;
    largest = std::max(largest, std::fabs(difference));
  }
  WARN("losses in bf16: from " << exact.steps.front().loss << " to " << exact.steps.back().loss
                               << ", mean difference of the last fifth " << last_fifth
                               << ", largest " << largest);
  CHECK(exact.steps.back().loss < exact.steps.front().loss - 0.5);  // something was learnt
  CHECK(std::fabs(last_fifth) < 5e-3);
  CHECK(largest < 5e-2);
}

TEST_CASE("cuda: bf16 follows fp32: latent attention and experts", "[cuda]") {
  if (skipped_without_gpu()) return;
  check_bf16(wide_moe());
}

TEST_CASE("cuda: bf16 follows fp32: grouped queries, tied head", "[cuda]") {
  if (skipped_without_gpu()) return;
  check_bf16(wide_dense());
}

TEST_CASE("cuda: bf16 trains models of odd sizes", "[cuda]") {
  if (skipped_without_gpu()) return;
  for (const ModelConfig& model : {tiny_moe(), tiny_v2(), tiny_dense(), tiny_mtp()}) {
    Config config = job_of(model, Recompute::selective);
    const LayoutReference cpu(config, 1);
    config.precision.compute = ComputeType::bf16;
    const LayoutRun gpu = run_layout(config, {}, on_gpu(replay_options(cpu)));
    const double gradients =
        relative_difference(flat(gradients_of(config, gpu)), flat(gradients_of(config, cpu.run)));
    CHECK(gradients < 0.05);
    CHECK(gpu.steps[0].loss == Approx(cpu.run.steps[0].loss).epsilon(1e-2));
  }
}

// --- the same run twice

TEST_CASE("cuda: the same run gives the same bits", "[cuda]") {
  if (skipped_without_gpu()) return;
  const ComputeType compute = GENERATE(ComputeType::fp32, ComputeType::bf16);
  for (const ModelConfig& model : {tiny_mtp(), tiny_dense(), wide_moe(), wide_dense()}) {
    Config config = job_of(model, Recompute::full);
    config.precision.compute = compute;
    LayoutRunOptions options = on_gpu({}, /*deterministic=*/true);
    options.steps = 10;
    const LayoutRun first = run_layout(config, {}, options);
    CHECK(bit_difference(first, run_layout(config, {}, options)) == "");
    REQUIRE(std::isfinite(first.steps.back().loss));
  }
}

// --- evaluation

struct Evaluation {
  double loss = 0;
  std::vector<double> token_losses;
  std::vector<float> logits;
};

Evaluation evaluate(Backend& backend, const ModelConfig& model, const TinyBatch& batch,
                    DType dtype) {
  TrainEngine engine(backend, model, tiny_options({batch}, dtype));
  engine.allocate();
  engine.initialize(7);
  Evaluation out;
  out.token_losses.resize(batch.tokens.size());
  engine.begin_evaluation();
  engine.evaluate(batch.host(), out.token_losses.data());
  out.loss = engine.finish_evaluation();
  engine.logits(batch.host(), 3, 11, out.logits);
  return out;
}

std::vector<double> doubles(const std::vector<float>& x) {
  return {x.begin(), x.end()};
}

TEST_CASE("cuda: evaluation and logits are those of the CPU", "[cuda]") {
  if (skipped_without_gpu()) return;
  const auto cpu = make_cpu_backend(1);
  for (const ModelConfig& model : {tiny_moe(), tiny_v2(), tiny_dense(), tiny_mtp()}) {
    const TinyBatch batch(model, {.seed = 5, .packed = true, .ignored = 0.1});
    const Evaluation want = evaluate(*cpu, model, batch, DType::f32);
    const Evaluation got = evaluate(gpu_backend(), model, batch, DType::f32);
    CHECK(got.loss == Approx(want.loss).epsilon(1e-5));
    CHECK(relative_difference(got.token_losses, want.token_losses) < 1e-5);
    CHECK(relative_difference(doubles(got.logits), doubles(want.logits)) < 1e-5);
    const Evaluation narrow = evaluate(gpu_backend(), model, batch, DType::bf16);
    CHECK(narrow.loss == Approx(want.loss).epsilon(2e-2));
  }
}

}  // namespace
}  // namespace dstrain::test
