#include "core/config/layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "core/base/format_units.h"
#include "core/config/near_numbers.h"

namespace dstrain {
namespace {

constexpr int64_t kMaxRanks = 1 << 20;

struct Rules {
  std::vector<LayoutProblem> problems;

  template <class... Args>
  void broken(const char* key, std::string hint, fmt::format_string<Args...> message,
              Args&&... args) {
    problems.push_back({key, fmt::format(message, std::forward<Args>(args)...), std::move(hint)});
  }
};

bool has_dense_blocks(const ModelConfig& m) {
  for (int64_t layer = 0; layer < m.num_hidden_layers; ++layer)
    if (!m.is_moe_layer(layer)) return true;
  return false;
}

// Something that tensor parallelism cuts into equal parts.
struct Cut {
  int64_t size;
  std::string name;
};

std::vector<Cut> tensor_cuts(const Config& c, const MeshShape& shape) {
  const ModelConfig& m = c.model;
  std::vector<Cut> cuts;
  if (m.is_mla())
    cuts.push_back(
        {m.num_attention_heads, fmt::format("the {} of model.num_attention_heads",
                                            format_plural(m.num_attention_heads, "head"))});
  else
    cuts.push_back(
        {m.kv_heads(),
         fmt::format("the {} of model.{}", format_plural(m.kv_heads(), "head"),
                     m.num_key_value_heads > 0 ? "num_key_value_heads" : "num_attention_heads")});
  if (has_dense_blocks(m))
    cuts.push_back(
        {m.intermediate_size, fmt::format("model.intermediate_size ({})", m.intermediate_size)});
  const int64_t shared = m.n_shared_experts * m.moe_intermediate_size;
  if (m.n_routed_experts > 0 && shared > 0)
    cuts.push_back(
        {shared, fmt::format("the width of the shared experts (model.n_shared_experts {} x "
                             "model.moe_intermediate_size {})",
                             m.n_shared_experts, m.moe_intermediate_size)});
  const int64_t tokens = c.train.micro_batch * (c.data.seq_len / shape.context);
  if (c.data.seq_len % shape.context == 0 && tokens > 0)  // otherwise a rule of its own is broken
    cuts.push_back(
        {tokens, fmt::format("the {} of a micro-batch (train.micro_batch x data.seq_len{})",
                             format_plural(tokens, "token"),
                             shape.context > 1 ? " / parallel.context" : "")});
  return cuts;
}

// Sizes of an axis near this one that divide n. Where the job's number of ranks is given, the ranks
// that are left over have to go to data parallelism.
std::string near_sizes(const Config& c, const MeshShape& shape, int64_t n, int size) {
  const bool given = launch_ranks(c.launch) == shape.ranks();
  return nearest_divisors(given ? std::gcd(n, int64_t{shape.data} * size) : n, size);
}

void check_tensor(const Config& c, const MeshShape& shape, Rules& rules) {
  const std::vector<Cut> cuts = tensor_cuts(c, shape);
  int64_t common = 0;
  for (const Cut& cut : cuts) common = std::gcd(common, cut.size);
  for (const Cut& cut : cuts)
    if (cut.size % shape.tensor != 0)
      rules.broken("parallel.tensor", "try " + near_sizes(c, shape, common, shape.tensor),
                   "parallel.tensor ({}) does not divide {}", shape.tensor, cut.name);
}

// A rank holds two pieces of each sequence, one from either end, so that causal attention costs the
// same everywhere.
void check_context(const Config& c, const MeshShape& shape, Rules& rules) {
  const int64_t seq_len = c.data.seq_len;
  if (shape.context == 1 || seq_len % (2 * int64_t{shape.context}) == 0) return;
  rules.broken(
      "parallel.context",
      fmt::format("try {}, or data.seq_len {}",
                  seq_len % 2 == 0 ? near_sizes(c, shape, seq_len / 2, shape.context) : "1",
                  nearest_multiples(2 * int64_t{shape.context}, seq_len)),
      "data.seq_len ({}) does not divide into 2 pieces for each of parallel.context ({}) ranks",
      seq_len, shape.context);
}

// Experts are never cut: each is whole on one rank of its group.
void check_experts(const Config& c, const MeshShape& shape, Rules& rules) {
  if (shape.expert == 1) return;
  const int64_t experts = c.model.n_routed_experts, ranks = shape.stage_ranks();
  if (experts == 0)
    return rules.broken("parallel.expert", "write 1",
                        "parallel.expert is {}, but the model has no experts "
                        "(model.n_routed_experts 0)",
                        shape.expert);
  if (experts % shape.expert != 0)
    rules.broken("parallel.expert", "try " + nearest_divisors(experts, shape.expert),
                 "model.n_routed_experts ({}) does not divide over parallel.expert ({})", experts,
                 shape.expert);
  else if (ranks % shape.expert != 0)
    rules.broken(
        "parallel.expert", "try " + nearest_divisors(std::gcd(experts, ranks), shape.expert),
        "parallel.expert ({}) does not divide the {} of a pipeline stage (data {} x "
        "context {} x tensor {})",
        shape.expert, format_plural(ranks, "rank"), shape.data, shape.context, shape.tensor);
}

void check_batch(const Config& c, const MeshShape& shape, Rules& rules) {
  const int64_t batch = c.train.global_batch, micro_batch = c.train.micro_batch;
  if (batch % shape.data != 0)
    rules.broken("train.global_batch", "try " + nearest_multiples(shape.data, batch),
                 "train.global_batch ({}) does not divide over {}", batch,
                 format_plural(shape.data, "data-parallel rank"));
  else if (batch / shape.data % micro_batch != 0)
    rules.broken("train.micro_batch",
                 "try micro_batch " + nearest_divisors(batch / shape.data, micro_batch),
                 "train.global_batch ({}) is not a multiple of train.micro_batch ({}) x {}", batch,
                 micro_batch, format_plural(shape.data, "data-parallel rank"));
}

void check_interleaved(const Config& c, const MeshShape& shape, Rules& rules) {
  const int64_t count = micro_batches_per_step(c, shape), stages = shape.pipeline;
  const int64_t sequences = c.train.micro_batch * shape.data;
  if (c.train.global_batch % sequences != 0 || count % stages == 0) return;
  rules.broken(
      "train.global_batch",
      fmt::format("try {}, or parallel.schedule: 1f1b",
                  nearest_multiples(stages * sequences, c.train.global_batch)),
      "parallel.schedule interleaved takes micro-batches in rounds of parallel.pipeline ({}), "
      "but a step has {} (train.global_batch {} / train.micro_batch {} / data {})",
      stages, count, c.train.global_batch, c.train.micro_batch, shape.data);
}

void check_pipeline(const Config& c, const MeshShape& shape, Rules& rules) {
  const ParallelConfig& p = c.parallel;
  const bool interleaved = p.schedule == PipelineOrder::interleaved;
  if (interleaved && p.virtual_stages == 1)
    rules.broken("parallel.virtual_stages", "write 2, or parallel.schedule: 1f1b",
                 "parallel.schedule interleaved needs parallel.virtual_stages of at least 2");
  if (!interleaved && p.virtual_stages > 1)
    rules.broken("parallel.virtual_stages", "write 1, or parallel.schedule: interleaved",
                 "parallel.virtual_stages ({}) needs parallel.schedule interleaved, not {}",
                 p.virtual_stages, enum_name(p.schedule));
  if (shape.pipeline == 1) return;

  const int64_t layers = c.model.num_hidden_layers, chunks = chunks_per_stage(c, shape);
  if (shape.pipeline > layers)
    rules.broken("parallel.pipeline", fmt::format("write at most {}", layers),
                 "parallel.pipeline ({}) is more than model.num_hidden_layers ({})", shape.pipeline,
                 layers);
  else if (shape.pipeline * chunks > layers)
    rules.broken("parallel.virtual_stages",
                 fmt::format("write at most {}", layers / shape.pipeline),
                 "parallel.pipeline ({}) x parallel.virtual_stages ({}) is more than "
                 "model.num_hidden_layers ({})",
                 shape.pipeline, chunks, layers);
  if (interleaved) check_interleaved(c, shape, rules);
  if (p.schedule != PipelineOrder::zero_bubble) return;
  if (c.train.recompute != Recompute::none)
    rules.broken(
        "train.recompute", "write none, or parallel.schedule: 1f1b",
        "parallel.schedule zero_bubble keeps activations for the weight gradients, which come "
        "later; train.recompute must be none, not {}",
        enum_name(c.train.recompute));
  // ZeRO 2 and 3 reduce the gradients of each micro-batch by themselves, but here those of several
  // are under way in a block: what backward_weight makes later, and what latent attention under
  // context parallelism adds for its peers' keys in backward_input.
  if (p.zero > 1)
    rules.broken("parallel.zero", "write 1, or parallel.schedule: 1f1b",
                 "parallel.schedule zero_bubble computes weight gradients of a micro-batch between "
                 "those of others; parallel.zero must be at most 1, not {}",
                 p.zero);
}

}  // namespace

std::string to_text(const MeshShape& shape) {
  std::string text;
  for (const auto& [name, size] : {std::pair{"pipeline", shape.pipeline},
                                   {"data", shape.data},
                                   {"context", shape.context},
                                   {"tensor", shape.tensor}})
    if (size > 1) text += fmt::format("{}{} {}", text.empty() ? "" : " x ", name, size);
  if (text.empty()) text = "data 1";
  if (shape.expert > 1) text += fmt::format(", expert {}", shape.expert);
  return text;
}

std::vector<LayoutProblem> check_layout(const Config& c, const MeshShape& shape) {
  Rules rules;
  if (shape.stage_ranks() > kMaxRanks / shape.pipeline) {
    rules.broken("parallel", fmt::format("use at most {} ranks", kMaxRanks),
                 "the layout {} has more ranks than any job can start", to_text(shape));
    return rules.problems;
  }
  check_tensor(c, shape, rules);
  check_context(c, shape, rules);
  check_experts(c, shape, rules);
  check_batch(c, shape, rules);
  check_pipeline(c, shape, rules);
  return rules.problems;
}

std::vector<std::string> layout_notes(const Config& c, const MeshShape& shape) {
  const ParallelConfig& p = c.parallel;
  const int64_t count = micro_batches_per_step(c, shape);
  std::vector<std::string> notes;
  if (p.zero >= 2 && !p.keep_full_grads && count > 1 && shape.stage_ranks() > 1)
    notes.push_back(fmt::format(
        "parallel.zero {} sums gradients over ranks after each of the {} micro-batches of a step; "
        "parallel.keep_full_grads: true does so once, for the memory of all gradients",
        p.zero, count));
  if (p.keep_full_grads && p.zero < 2)
    notes.push_back(fmt::format(
        "parallel.keep_full_grads changes nothing with parallel.zero {}, which keeps them anyway",
        p.zero));
  if (shape.pipeline == 1 && p.schedule != PipelineOrder::one_f_one_b)
    notes.push_back(fmt::format("parallel.schedule {} changes nothing with one pipeline stage",
                                enum_name(p.schedule)));
  if (count < shape.pipeline)
    notes.push_back(
        fmt::format("a step has fewer micro-batches ({}) than there are pipeline stages ({}), so "
                    "that most of them "
                    "wait most of the time; raise train.global_batch or lower train.micro_batch",
                    count, shape.pipeline));
  return notes;
}

int64_t micro_batches_per_step(const Config& c, const MeshShape& shape) {
  return c.train.global_batch / (c.train.micro_batch * shape.data);
}

int64_t chunks_per_stage(const Config& c, const MeshShape& shape) {
  return shape.pipeline > 1 ? c.parallel.virtual_stages : 1;
}

}  // namespace dstrain
