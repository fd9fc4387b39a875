// The sections `parallel`, `compression` and `launch`: what more than one rank needs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/config/field.h"

namespace dstrain {

// A count, or auto (0).
struct AutoInt {
  int64_t value = 0;
  bool is_auto() const { return value == 0; }
  bool operator==(const AutoInt&) const = default;
};

enum class PipelineOrder { one_f_one_b, interleaved, zero_bubble };
DSTRAIN_ENUM_NAMES(PipelineOrder, {PipelineOrder::one_f_one_b, "1f1b"},
                   {PipelineOrder::interleaved, "interleaved"},
                   {PipelineOrder::zero_bubble, "zero_bubble"});

struct ParallelConfig {
  AutoInt data;
  int64_t tensor = 1, pipeline = 1, expert = 1, context = 1;
  PipelineOrder schedule = PipelineOrder::one_f_one_b;
  int64_t virtual_stages = 1;  // model chunks of a pipeline stage
  int64_t zero = 1;
  bool keep_full_grads = false;  // with ZeRO 2 and 3
  double expert_buffer = 1.5;
  bool hierarchical = true;

  static void fields(auto& field, auto& c) {
    field("data", c.data, in_range(1, 65536),
          "data-parallel ranks; auto takes what the other axes leave");
    field("tensor", c.tensor, in_range(1, 65536),
          "tensor-parallel ranks: they share heads, widths and vocabulary");
    field("pipeline", c.pipeline, in_range(1, 65536), "pipeline stages: they share the blocks");
    field("expert", c.expert, in_range(1, 65536),
          "ranks of a pipeline stage, of any axes, that share the routed experts");
    field("context", c.context, in_range(1, 65536),
          "context-parallel ranks: they share each sequence");
    field("schedule", c.schedule, any(),
          "order of a pipeline stage's work: 1f1b, interleaved (each stage holds virtual_stages "
          "chunks of the model) or zero_bubble (weight gradients fill the gaps)");
    field("virtual_stages", c.virtual_stages, in_range(1, 1024),
          "model chunks per pipeline stage; interleaved only");
    field("zero", c.zero, in_range(0, 3),
          "ZeRO stage: 1 shards optimizer state, 2 gradients, 3 parameters");
    field(
        "keep_full_grads", c.keep_full_grads, any(),
        "zero 2 and 3: keep all gradients on each rank and sum them once per step instead of after "
        "each micro-batch");
    field("expert_buffer", c.expert_buffer, at_least(1.0),
          "receive buffer of expert parallelism over the balanced load; overflow runs exact extra "
          "rounds");
    field(
        "hierarchical", c.hierarchical, any(),
        "where every node has the same number of ranks, sum gradients inside the nodes first, then "
        "between them");
  }
};

enum class CompressionMethod { none, topk, int8, automatic };
DSTRAIN_ENUM_NAMES(CompressionMethod, {CompressionMethod::none, "none"},
                   {CompressionMethod::topk, "topk"}, {CompressionMethod::int8, "int8"},
                   {CompressionMethod::automatic, "auto"});
enum class CompressedValues { bf16, f32 };
DSTRAIN_ENUM_NAMES(CompressedValues, {CompressedValues::bf16, "bf16"},
                   {CompressedValues::f32, "f32"});
enum class CompressionScope { all, inter_node };
DSTRAIN_ENUM_NAMES(CompressionScope, {CompressionScope::all, "all"},
                   {CompressionScope::inter_node, "inter_node"});

struct CompressionConfig {
  CompressionMethod method = CompressionMethod::none;
  double density = 0.05;
  CompressedValues value_dtype = CompressedValues::bf16;
  AutoInt block;  // elements
  bool error_feedback = true;
  int64_t dense_steps = 0;
  CompressionScope scope = CompressionScope::all;

  static void fields(auto& field, auto& c) {
    field("method", c.method, any(),
          "none, topk, int8, or auto: each range of gradients as measurements of the link at the "
          "start find it to be fastest");
    field("density", c.density, in_range(0.0, 1.0),
          "topk: share of the gradient's elements that is sent; with method auto, 0 leaves topk out");
    field("value_dtype", c.value_dtype, any(), "topk: type of the elements that are sent");
    field("block", c.block, in_range(16, 65536),
          "elements that are compressed together; auto is 8192 with topk and 256 with int8");
    field("error_feedback", c.error_feedback, any(),
          "add what was not sent to the next gradient; costs 4 bytes per gradient element");
    field("dense_steps", c.dense_steps, at_least(0),
          "optimizer steps at the start of the run that send everything");
    field("scope", c.scope, any(),
          "all traffic of gradients, or only between nodes (inside them sums are exact)");
  }
};

struct LaunchConfig {
  AutoInt ranks;
  std::vector<std::string> hosts;
  int64_t max_restarts = 3;
  int64_t grace = 25;          // seconds; Slurm and Kubernetes kill after 30
  int64_t hang_timeout = 600;  // seconds; 0 = off

  static void fields(auto& field, auto& c) {
    field("ranks", c.ranks, in_range(1, 65536),
          "ranks per host; auto is one per GPU, else what the layout needs");
    field("hosts", c.hosts, any(),
          "hosts to start ranks on: node1, or node1:8 for another number of ranks there");
    field("max_restarts", c.max_restarts, at_least(0),
          "restarts from a checkpoint before giving up");
    field("grace", c.grace, in_range(0, 1e6),
          "seconds for saving and leaving after a signal to leave");
    field("hang_timeout", c.hang_timeout, in_range(0, 1e6),
          "seconds without progress after which a rank is ended; 0 waits for ever");
  }
};

}  // namespace dstrain
