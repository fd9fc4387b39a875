// Records as a small MoE run would fill them.
#pragma once

#include "core/metrics/run_info.h"
#include "core/metrics/step_record.h"

namespace dstrain {

inline StepRecord example_step(int64_t step, int64_t steps = 600) {
  StepRecord record;
  record.step = step;
  record.steps = steps;
  record.loss = 3.4123;
  record.grad_norm = 0.8125;
  record.lr = 9.8e-4;
  record.tokens = 4096;
  record.total_tokens = 4096 * step;
  record.tokens_per_s = 4612;
  record.step_ms = 888;
  record.experts = ExpertLoad{1.324, 1.125, 0, 0.0, 1.02};
  record.phases = {1.5, 800, 80, 0};
  return record;
}

inline EvalRecord example_eval(int64_t step) {
  EvalRecord record;
  record.step = step;
  record.set = "valid";
  record.loss = 3.52;
  record.perplexity = 33.78;
  record.bits_per_byte = 1.8512;
  record.tokens = 51200;
  record.seconds = 4.2;
  return record;
}

inline CheckpointRecord example_checkpoint(int64_t step) {
  CheckpointRecord record;
  record.step = step;
  record.seconds = 1.25;
  record.bytes = 89653248;
  record.stall_ms = 41;
  return record;
}

inline StartupInfo example_start() {
  StartupInfo info;
  info.version = "0.1.0";
  info.commit = "427939d2abc1";
  info.run_name = "kjv-moe";
  info.run_dir = "runs/kjv-moe";
  info.device = "cpu";
  info.threads = 2;
  info.isa = "avx512";
  info.precision = "fp32";
  info.model = "6 layers (1 dense), hidden 256, 4 heads, 16 experts top-4";
  info.parameters_total = 7125504;
  info.parameters_active = 2914560;
  info.flops_per_token = 17.5e6;
  info.memory = {{"parameters", 28502016},
                 {"gradients", 28502016},
                 {"optimizer", 57004032},
                 {"activations", 210000000}};
  info.memory_available_bytes = int64_t{8} << 30;
  info.data = {{"train", "data/kjv/train", 1012345, 31102, 1.0},
               {"valid", "data/kjv/valid", 51200, 1500, 1.0}};
  info.steps = 600;
  info.tokens_per_step = 4096;
  info.epochs = 2.43;
  info.optimizer = "adamw, betas 0.9 0.95";
  info.schedule = "cosine, peak 1.0e-03";
  info.checkpoints = "every 100 steps";
  return info;
}

inline RunSummary example_summary() {
  RunSummary summary;
  summary.step = 600;
  summary.steps = 600;
  summary.total_tokens = 2457600;
  summary.seconds = 533;
  summary.loss = 3.2914;
  summary.evals = {example_eval(600)};
  summary.tokens_per_s = 4610;
  summary.checkpoint = "runs/kjv-moe/checkpoints/step_00000600";
  summary.metrics = "runs/kjv-moe/metrics.jsonl";
  summary.tensorboard = "runs/kjv-moe/tensorboard";
  summary.next = {{"write text", "deepseek-train generate --run runs/kjv-moe"},
                  {"export", "deepseek-train export runs/kjv-moe --output kjv-hf"}};
  return summary;
}

}  // namespace dstrain
