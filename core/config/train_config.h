// The sections `train`, `optimizer`, `schedule` and `precision`: what a step does.
#pragma once

#include <cstdint>
#include <utility>

#include "core/config/field.h"

namespace dstrain {

enum class Recompute { none, selective, full };
DSTRAIN_ENUM_NAMES(Recompute, {Recompute::none, "none"}, {Recompute::selective, "selective"},
                   {Recompute::full, "full"});

struct TrainConfig {
  int64_t steps = 1000;
  int64_t global_batch = 16;  // sequences an optimizer step
  int64_t micro_batch = 8;    // sequences a forward pass, per data-parallel rank
  Recompute recompute = Recompute::none;
  int64_t eval_every = 0;    // steps; 0 = only at the end
  int64_t eval_batches = 0;  // 0 = all of data.valid
  int64_t log_every = 1;
  int64_t max_skipped_steps = 10;  // in a row

  static void fields(auto& field, auto& c) {
    field("steps", c.steps, in_range(0, 1e12), "optimizer steps of the whole run");
    field("global_batch", c.global_batch, in_range(1, 1 << 30), "sequences per optimizer step");
    field("micro_batch", c.micro_batch, in_range(1, 1 << 24),
          "sequences per forward pass and data-parallel rank");
    field("recompute", c.recompute, any(),
          "activations computed again in backward: none, selective (norms, SwiGLU, attention "
          "inputs) or full blocks");
    field("eval_every", c.eval_every, at_least(0),
          "steps between evaluations; 0 evaluates at the end only");
    field("eval_batches", c.eval_batches, at_least(0),
          "global batches per evaluation; 0 reads all of data.valid");
    field("log_every", c.log_every, at_least(1),
          "steps between lines where the output is no terminal");
    field("max_skipped_steps", c.max_skipped_steps, at_least(1),
          "steps in a row without a finite gradient after which the run ends with an error");
  }
};

enum class OptimizerName { adamw };
DSTRAIN_ENUM_NAMES(OptimizerName, {OptimizerName::adamw, "adamw"});

struct OptimizerConfig {
  OptimizerName name = OptimizerName::adamw;
  double lr = 1e-3;
  std::pair<double, double> betas = {0.9, 0.95};
  double eps = 1e-8;
  double weight_decay = 0.1;  // on tensors of two or more dims
  double grad_clip = 1.0;     // global norm; 0 = off

  static void fields(auto& field, auto& c) {
    field("name", c.name, any(), "adamw");
    field("lr", c.lr, at_least(0.0), "peak learning rate");
    field("betas", c.betas, in_range(0.0, 1.0), "decay of the first and second moment");
    field("eps", c.eps, above(0.0), "added to the root of the second moment");
    field("weight_decay", c.weight_decay, at_least(0.0),
          "decoupled weight decay of tensors of two or more dims");
    field("grad_clip", c.grad_clip, at_least(0.0), "limit of the global gradient norm; 0 is off");
  }
};

enum class ScheduleName { constant, linear, cosine, wsd };
DSTRAIN_ENUM_NAMES(ScheduleName, {ScheduleName::constant, "constant"},
                   {ScheduleName::linear, "linear"}, {ScheduleName::cosine, "cosine"},
                   {ScheduleName::wsd, "wsd"});

// A number of steps ("100") or a share of train.steps ("5%").
struct StepCount {
  double value = 0;
  bool percent = false;
  int64_t resolve(int64_t steps) const {
    return percent ? static_cast<int64_t>(value / 100.0 * static_cast<double>(steps) + 0.5)
                   : static_cast<int64_t>(value);
  }
  bool operator==(const StepCount&) const = default;
};

struct ScheduleConfig {
  ScheduleName name = ScheduleName::cosine;
  StepCount warmup = {5, true};
  double min_lr_ratio = 0.1;
  StepCount decay = {20, true};  // wsd: length of the last part

  static void fields(auto& field, auto& c) {
    field("name", c.name, any(), "constant, linear, cosine or wsd (warm-up, stable, decay)");
    field("warmup", c.warmup, at_least(0.0), "linear warm-up: steps, or a percentage such as 5%");
    field("min_lr_ratio", c.min_lr_ratio, in_range(0.0, 1.0), "final lr over peak lr");
    field("decay", c.decay, at_least(0.0), "wsd only: length of the decay, steps or a percentage");
  }
};

enum class ComputeType { automatic, fp32, tf32, bf16 };
DSTRAIN_ENUM_NAMES(ComputeType, {ComputeType::automatic, "auto"}, {ComputeType::fp32, "fp32"},
                   {ComputeType::tf32, "tf32"}, {ComputeType::bf16, "bf16"});
enum class MomentType { fp32, bf16 };
DSTRAIN_ENUM_NAMES(MomentType, {MomentType::fp32, "fp32"}, {MomentType::bf16, "bf16"});
enum class ReduceType { fp32, bf16 };
DSTRAIN_ENUM_NAMES(ReduceType, {ReduceType::fp32, "fp32"}, {ReduceType::bf16, "bf16"});
enum class Quantization { none, aware };
DSTRAIN_ENUM_NAMES(Quantization, {Quantization::none, "none"}, {Quantization::aware, "aware"});

struct PrecisionConfig {
  ComputeType compute = ComputeType::automatic;
  MomentType moments = MomentType::fp32;
  ReduceType reduce = ReduceType::fp32;
  Quantization quantization = Quantization::none;

  static void fields(auto& field, auto& c) {
    field("compute", c.compute, any(), "auto is fp32 on a CPU and bf16 on a GPU");
    field("moments", c.moments, any(), "storage of the optimizer's moments");
    field("reduce", c.reduce, any(),
          "what gradients travel as when ranks sum them; bf16 sends half, and micro-batches still "
          "add up in fp32");
    field("quantization", c.quantization, any(), "aware trains with fake-quantised weights");
  }
};

}  // namespace dstrain
