#include "test/support/layout_jobs.h"

#include <fmt/format.h>

#include <algorithm>

namespace dstrain::test {
namespace {

Config tiny_job(int64_t layers) {
  Config config;
  ModelConfig& m = config.model;
  m.vocab_size = 67;
  m.hidden_size = 32;
  m.num_hidden_layers = layers;
  m.intermediate_size = 48;
  m.initializer_range = 0.1;
  config.data.seq_len = 32;
  config.train.global_batch = 8;
  config.train.micro_batch = 1;
  config.optimizer.lr = 3e-3;
  return config;
}

}  // namespace

Config tiny_moe_job(int64_t layers) {
  Config config = tiny_job(layers);
  ModelConfig& m = config.model;
  m.num_attention_heads = 8;
  m.q_lora_rank = 12;
  m.kv_lora_rank = 16;
  m.qk_nope_head_dim = 4;
  m.qk_rope_head_dim = 4;
  m.v_head_dim = 4;
  m.n_routed_experts = 8;
  m.num_experts_per_tok = 2;
  m.n_shared_experts = 1;
  m.moe_intermediate_size = 16;
  m.first_k_dense_replace = 1;
  m.n_group = 4;
  m.topk_group = 2;
  m.aux_loss_alpha = 0.01;
  m.bias_update_speed = 0.01;
  return config;
}

Config tiny_dense_job(int64_t layers) {
  Config config = tiny_job(layers);
  ModelConfig& m = config.model;
  m.num_attention_heads = 16;
  m.num_key_value_heads = 8;
  m.head_dim = 4;
  m.tie_word_embeddings = true;
  return config;
}

std::string to_text(const LayoutJob& job) {
  const ParallelConfig& p = job.config.parallel;
  return fmt::format("{}, zero {}{}", dstrain::to_text(job.shape), p.zero,
                     job.shape.pipeline > 1 ? fmt::format(", {}", enum_name(p.schedule)) : "");
}

LayoutJob job_at(Config config, const MeshShape& shape, int64_t zero, PipelineOrder schedule) {
  config = with_shape(std::move(config), shape);
  config.parallel.zero = zero;
  config.parallel.schedule = schedule;
  config.parallel.virtual_stages = schedule == PipelineOrder::interleaved ? 2 : 1;
  return {config, shape};
}

int64_t layers_for(const MeshShape& shape, PipelineOrder schedule) {
  return std::max(4, shape.pipeline * (schedule == PipelineOrder::interleaved ? 2 : 1));
}

std::vector<LayoutJob> all_layouts(TinyModel model, int ranks, int64_t zero) {
  std::vector<LayoutJob> jobs;
  for (const auto schedule :
       {PipelineOrder::one_f_one_b, PipelineOrder::interleaved, PipelineOrder::zero_bubble}) {
    Config any = model == TinyModel::moe ? tiny_moe_job(16) : tiny_dense_job(16);
    any = job_at(any, {}, zero, schedule).config;
    for (const MeshShape& shape : legal_shapes(any, ranks)) {
      if (shape.pipeline == 1 && schedule != PipelineOrder::one_f_one_b) continue;
      any.model.num_hidden_layers = layers_for(shape, schedule);
      jobs.push_back(job_at(any, shape, zero, schedule));
    }
  }
  return jobs;
}

std::vector<LayoutJob> layouts_in_turn(TinyModel model, int ranks) {
  std::vector<LayoutJob> jobs = all_layouts(model, ranks, 0);
  for (size_t i = 0; i < jobs.size(); ++i) {
    ParallelConfig& parallel = jobs[i].config.parallel;
    const int64_t stages = parallel.schedule == PipelineOrder::zero_bubble ? 2 : 4;
    parallel.zero = static_cast<int64_t>(i) % stages;
  }
  return jobs;
}

LayoutReference::LayoutReference(
    const Config& job, int64_t steps, const std::function<void(TrainEngine&)>& at_start,
    const std::function<std::unique_ptr<Backend>(int rank)>& make_backend)
    : config(with_shape(job, {})),
      record(std::make_shared<RoutingRecord>(job.train.global_batch, job.data.seq_len,
                                             std::max<int64_t>(1, job.model.num_experts_per_tok))) {
  LayoutRunOptions options;
  options.steps = steps;
  options.record = record;
  options.at_start = at_start;
  options.make_backend = make_backend;
  run = run_layout(config, {}, options);
}

LayoutRunOptions replay_options(const LayoutReference& reference) {
  LayoutRunOptions options;
  options.steps = std::ssize(reference.run.steps);
  options.record = reference.record;
  options.replay = true;
  options.timeout = std::chrono::seconds(20);
  return options;
}

std::string failures(const std::vector<LayoutCheck>& checks) {
  std::string text;
  for (const LayoutCheck& check : checks)
    if (!check.ok())
      text += fmt::format("{}: {:.3g} > {:.3g} ({})\n", check.name, check.worst, check.limit,
                          check.where);
  return text;
}

std::string failures(const LayoutReference& reference, const LayoutJob& job,
                     const LayoutRunOptions& options, const LayoutTolerances& tolerances) {
  try {
    return failures(compare_layouts(job.config, reference.run,
                                    run_layout(job.config, job.shape, options), tolerances));
  } catch (const std::exception& error) {
    return std::string(error.what()) + "\n";
  }
}

}  // namespace dstrain::test
