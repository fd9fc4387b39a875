#include "core/config/validate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/base/format_units.h"
#include "core/config/launch_hosts.h"
#include "core/config/layout.h"
#include "core/config/near_numbers.h"

namespace dstrain {
namespace {

// Collects broken rules; a problem stands where its key, or the section around it, was set.
class Rules {
 public:
  explicit Rules(const LoadedConfig& loaded) : loaded_(loaded) {}

  template <class... Args>
  void broken(const std::string& key, const std::string& hint, fmt::format_string<Args...> message,
              Args&&... args) {
    problems_.add(location(key), fmt::format(message, std::forward<Args>(args)...), hint);
  }
  void broken(const LayoutProblem& problem) {
    problems_.add(location(problem.key), problem.message, problem.hint);
  }
  void throw_if_any() const { problems_.throw_if_any(loaded_.sources); }

 private:
  Location location(const std::string& key) const {
    const Origin& origin = loaded_.origin(key);
    if (origin.location.source >= 0) return origin.location;
    // A key left at its default is a matter of the job file as a whole.
    const bool has_file = !loaded_.sources.empty() && loaded_.sources.is_file(0);
    return has_file ? Location{0, 0, 0, 1} : Location{};
  }

  const LoadedConfig& loaded_;
  Problems problems_;
};

void check_run(const Config& c, Purpose purpose, Rules& rules) {
  if (c.run.name.empty()) {
    if (purpose == Purpose::train)
      rules.broken("run.name", "add  run: {name: my-run}",
                   "run.name is missing; outputs go to <run.dir>/<run.name>");
  } else if (!is_safe_name(c.run.name)) {
    rules.broken("run.name", "use letters, digits, '.', '_' and '-'",
                 "run.name {} cannot be a folder's name", quote(c.run.name));
  }
  if (c.run.dir.empty())
    rules.broken("run.dir", "write '.' for the current folder", "run.dir is empty");
}

void check_attention(const ModelConfig& m, Rules& rules) {
  if (m.is_mla()) {
    if (m.qk_rope_head_dim < 2 || m.qk_rope_head_dim % 2 != 0)
      rules.broken(
          "model.qk_rope_head_dim",
          fmt::format("write {}", std::max<int64_t>(2, m.qk_rope_head_dim + 1)),
          "model.qk_rope_head_dim must be even and at least 2, since RoPE turns pairs; got {}",
          m.qk_rope_head_dim);
    if (m.v_head_dim < 1)
      rules.broken("model.v_head_dim", "128 in DeepSeek-V3",
                   "model.v_head_dim must be at least 1 with MLA (kv_lora_rank {})",
                   m.kv_lora_rank);
    if (m.num_key_value_heads != 0 && m.num_key_value_heads != m.num_attention_heads)
      rules.broken("model.num_key_value_heads", "leave it out",
                   "model.num_key_value_heads is {}, but MLA has one per attention head ({})",
                   m.num_key_value_heads, m.num_attention_heads);
    if (m.head_dim != 0 && m.head_dim != m.qk_rope_head_dim)
      rules.broken("model.head_dim", "leave it out",
                   "model.head_dim is for grouped-query attention; MLA has qk_nope_head_dim, "
                   "qk_rope_head_dim and v_head_dim");
    if (m.has_attention_output_bias() != m.attention_bias)
      rules.broken("model.attention_output_bias", "leave it out",
                   "model.attention_output_bias is for grouped-query attention; in MLA "
                   "attention_bias covers the output projection");
    return;
  }
  for (const auto& [key, value] : {std::pair{"q_lora_rank", m.q_lora_rank},
                                   {"qk_nope_head_dim", m.qk_nope_head_dim},
                                   {"qk_rope_head_dim", m.qk_rope_head_dim},
                                   {"v_head_dim", m.v_head_dim}})
    if (value > 0)
      rules.broken(fmt::format("model.{}", key), "set model.kv_lora_rank, or leave this key out",
                   "model.{} is {}, but without model.kv_lora_rank attention is not MLA", key,
                   value);
  if (m.num_attention_heads % m.kv_heads() != 0)
    rules.broken(
        "model.num_key_value_heads", "try " + nearest_divisors(m.num_attention_heads, m.kv_heads()),
        "model.num_attention_heads ({}) is not a multiple of model.num_key_value_heads ({})",
        m.num_attention_heads, m.kv_heads());
  if (m.head_dim == 0 && m.hidden_size % m.num_attention_heads != 0)
    rules.broken(
        "model.num_attention_heads",
        "set model.head_dim, or try " + nearest_divisors(m.hidden_size, m.num_attention_heads),
        "model.hidden_size ({}) does not divide over model.num_attention_heads ({})", m.hidden_size,
        m.num_attention_heads);
  else if (m.gqa_head_dim() % 2 != 0)
    rules.broken("model.head_dim", fmt::format("write {}", m.gqa_head_dim() + 1),
                 "the head width (model.head_dim) must be even, since RoPE turns pairs; it is {}",
                 m.gqa_head_dim());
}

void check_experts(const ModelConfig& m, Rules& rules) {
  const int64_t experts = m.n_routed_experts, k = m.num_experts_per_tok;
  if (experts == 0) return;
  if (k < 1 || k > experts)
    rules.broken("model.num_experts_per_tok", fmt::format("write 1 to {}", experts),
                 "model.num_experts_per_tok must be 1 to model.n_routed_experts ({}), got {}",
                 experts, k);
  if (m.n_group == 1 && m.topk_group == 1) return;
  if (m.topk_method == TopkMethod::greedy)
    return rules.broken(
        "model.n_group", "write topk_method: group_limited_greedy or noaux_tc, or n_group: 1",
        "model.topk_method greedy does not limit groups, but model.n_group is {}", m.n_group);
  if (experts % m.n_group != 0)
    return rules.broken(
        "model.n_group", "try " + nearest_divisors(experts, m.n_group),
        "model.n_routed_experts ({}) does not divide into model.n_group ({}) groups", experts,
        m.n_group);
  if (m.topk_group > m.n_group)
    return rules.broken("model.topk_group", fmt::format("write at most {}", m.n_group),
                        "model.topk_group ({}) is more than model.n_group ({})", m.topk_group,
                        m.n_group);
  const int64_t group_size = experts / m.n_group;
  if (m.topk_group * group_size < k)
    rules.broken(
        "model.topk_group", fmt::format("write at least {}", (k + group_size - 1) / group_size),
        "model.topk_group ({}) groups of {} hold fewer than model.num_experts_per_tok ({})",
        m.topk_group, format_plural(group_size, "expert"), k);
  if (m.topk_method == TopkMethod::noaux_tc && group_size < 2)
    rules.broken("model.n_group", fmt::format("write at most {}", experts / 2),
                 "model.topk_method noaux_tc ranks a group by its best two experts, but {} groups "
                 "leave {} each",
                 m.n_group, group_size);
}

// Far above anything that can be stored, far below the overflow of a 64-bit byte count.
void check_size(const ModelConfig& m, Rules& rules) {
  const double hidden = static_cast<double>(m.hidden_size);
  const double experts = static_cast<double>(m.n_routed_experts + m.n_shared_experts);
  const double widths = static_cast<double>(m.intermediate_size) +
                        experts * static_cast<double>(m.moe_intermediate_size) +
                        static_cast<double>(m.num_attention_heads) *
                            static_cast<double>(2 * m.qk_dim() + 2 * m.v_dim());
  const double parameters = static_cast<double>(m.num_hidden_layers) * 3 * hidden * widths +
                            2 * hidden * static_cast<double>(m.vocab_size);
  if (parameters > 1e15)
    rules.broken("model.hidden_size", "check the sizes under model",
                 "the model would have about {:.1e} parameters; the limit is 1e15", parameters);
}

void check_rope(const ModelConfig& m, Rules& rules) {
  const RopeScalingConfig& r = m.rope_scaling;
  if (r.type == RopeType::none && r.factor != 1.0)
    rules.broken("model.rope_scaling.factor",
                 "write type: linear, yarn or llama3, or leave factor out",
                 "model.rope_scaling.factor is {}, but type default does not scale", r.factor);
  if (r.type == RopeType::yarn && r.beta_fast <= r.beta_slow)
    rules.broken("model.rope_scaling.beta_fast", "32 and 1 are usual",
                 "model.rope_scaling.beta_fast ({}) must be above beta_slow ({})", r.beta_fast,
                 r.beta_slow);
  if (r.type == RopeType::llama3 && r.high_freq_factor <= r.low_freq_factor)
    rules.broken("model.rope_scaling.high_freq_factor", "4 and 1 are usual",
                 "model.rope_scaling.high_freq_factor ({}) must be above low_freq_factor ({})",
                 r.high_freq_factor, r.low_freq_factor);
}

// Where it is added to zero, the quotient would be one of zeros.
void check_epsilon(const char* key, const char* usual, double value, Rules& rules) {
  if (value < static_cast<double>(std::numeric_limits<float>::min()))
    rules.broken(key, usual, "{} ({:g}) is zero in fp32, which holds {:.2g} and above", key, value,
                 std::numeric_limits<float>::min());
}

void check_model(const ModelConfig& m, Rules& rules) {
  check_epsilon("model.rms_norm_eps", "1e-6 is usual", m.rms_norm_eps, rules);
  check_attention(m, rules);
  check_experts(m, rules);
  check_rope(m, rules);
  check_size(m, rules);
}

void check_data(const Config& c, Purpose purpose, Rules& rules) {
  if (c.data.seq_len > c.model.max_position_embeddings)
    rules.broken(
        "data.seq_len",
        fmt::format("write at most {}, or raise the model's", c.model.max_position_embeddings),
        "data.seq_len ({}) is more than model.max_position_embeddings ({})", c.data.seq_len,
        c.model.max_position_embeddings);
  const int64_t max_tokens = int64_t{1} << 30;
  if (c.train.micro_batch > max_tokens / c.data.seq_len)
    rules.broken("train.micro_batch", fmt::format("write at most {}", max_tokens / c.data.seq_len),
                 "train.micro_batch ({}) x data.seq_len ({}) is more than 2^30 tokens at once",
                 c.train.micro_batch, c.data.seq_len);
  const auto check_paths = [&](const char* list, const std::vector<DataSourceConfig>& sources) {
    for (size_t i = 0; i < sources.size(); ++i)
      if (sources[i].path.empty())
        rules.broken(fmt::format("data.{}[{}].path", list, i),
                     "name a dataset, or remove the element", "data.{}[{}] has no path", list, i);
  };
  check_paths("train", c.data.train);
  check_paths("valid", c.data.valid);
  if (purpose != Purpose::train) return;
  if (c.data.train.empty())
    rules.broken(
        "data.train",
        "add  data: {train: [{path: ...}]}; 'deepseek-train data build' makes one from text",
        "data.train is missing; there is nothing to train on");
  if (c.model.vocab_size == 0 && c.data.tokenizer.empty())
    rules.broken("model.vocab_size", "set data.tokenizer or model.vocab_size",
                 "the vocabulary is unknown: neither data.tokenizer nor model.vocab_size is set");
  if (c.train.eval_every > 0 && c.data.valid.empty())
    rules.broken("train.eval_every", "add data.valid, or write 0",
                 "train.eval_every is {}, but data.valid is empty", c.train.eval_every);
}

// A step is planned micro-batch by micro-batch; far fewer than this fill any time that one has.
void check_micro_batches(const Config& c, Rules& rules) {
  constexpr int64_t kMost = int64_t{1} << 20;
  const int64_t count = c.train.global_batch / c.train.micro_batch / data_parallel_ranks(c);
  if (count > kMost)
    rules.broken("train.global_batch", "raise train.micro_batch",
                 "train.global_batch ({}) makes {} micro-batches of {} on each data-parallel rank; "
                 "the limit "
                 "is {}",
                 c.train.global_batch, count, c.train.micro_batch, kMost);
}

void check_training(const Config& c, Rules& rules) {
  check_micro_batches(c, rules);
  check_epsilon("optimizer.eps", "1e-8 is usual", c.optimizer.eps, rules);
  for (const double beta : {c.optimizer.betas.first, c.optimizer.betas.second})
    if (beta >= 1.0) {
      rules.broken("optimizer.betas", "0.9 and 0.95 are usual",
                   "optimizer.betas must be below 1, got [{}, {}]", c.optimizer.betas.first,
                   c.optimizer.betas.second);
      break;
    }
  const int64_t steps = c.train.steps;
  const int64_t warmup = c.schedule.warmup.resolve(steps), decay = c.schedule.decay.resolve(steps);
  if (c.schedule.name == ScheduleName::wsd && warmup <= steps && warmup + decay > steps)
    rules.broken("schedule.decay", fmt::format("write at most {}", steps - warmup),
                 "schedule.warmup ({}) and schedule.decay ({}) together are longer than "
                 "train.steps ({})",
                 format_plural(warmup, "step"), format_plural(decay, "step"), steps);
  if (c.run.device == Device::cpu &&
      (c.precision.compute == ComputeType::bf16 || c.precision.compute == ComputeType::tf32))
    rules.broken("precision.compute", "write fp32 or auto, or run.device: cuda",
                 "precision.compute {} needs a GPU, but run.device is cpu",
                 enum_name(c.precision.compute));
  if (c.run.device == Device::cpu && c.precision.moments == MomentType::bf16)
    rules.broken("precision.moments", "write fp32, or run.device: cuda",
                 "precision.moments bf16 needs a GPU, but run.device is cpu");
}

// Elements of a block where compression.block is auto.
constexpr int64_t kTopkBlock = 8192;

void check_compression(const Config& c, Rules& rules) {
  const CompressionConfig& compression = c.compression;
  const int64_t block = compression.block.value;
  if (compression.method == CompressionMethod::automatic) {
    if (c.run.deterministic)
      rules.broken("compression.method",
                   "name none, int8 or topk: a run without run.deterministic tells at its start "
                   "what auto takes",
                   "compression.method auto chooses by measured times, which differ from run to "
                   "run, and run.deterministic asks for the same bits in every run");
    if (!compression.block.is_auto())
      rules.broken("compression.block", "write auto, or name the method",
                   "compression.block ({}) is a number for one method, and compression.method auto "
                   "may take two",
                   block);
  }
  if (c.precision.reduce == ReduceType::bf16 && compression.method != CompressionMethod::none)
    rules.broken("precision.reduce", "write fp32, or compression.method: none",
                 "precision.reduce bf16 and compression.method {} both say what is sent of "
                 "gradients{}",
                 enum_name(compression.method),
                 compression.method == CompressionMethod::automatic
                     ? ", and auto compares with sums in fp32 alone"
                     : "");
  if (compression.method != CompressionMethod::topk) return;
  if (compression.density <= 0)
    rules.broken("compression.density", "0.05 sends one element in twenty",
                 "compression.density must be above 0 with method topk");
  else if (const int64_t size = compression.block.is_auto() ? kTopkBlock : block;
           compression.density * static_cast<double>(size) < 1)
    rules.broken(compression.block.is_auto() ? "compression.density" : "compression.block",
                 compression.block.is_auto() ? "0.05 sends one element in twenty"
                                             : "write auto or a larger block",
                 "compression.density ({}) of a block of {} elements is less than one element",
                 compression.density, size);
}

void check_ranks(const Config& c, Rules& rules) {
  const std::optional<MeshShape> shape = planned_mesh(c);
  if (!shape) rules.broken(misfit(c, launch_ranks(c.launch)));
  for (const LayoutProblem& problem : check_layout(c, shape.value_or(smallest_mesh(c))))
    rules.broken(problem);
  for (size_t i = 0; i < c.launch.hosts.size(); ++i) {
    const std::string& host = c.launch.hosts[i];
    if (!parse_launch_host(host))
      rules.broken(
          fmt::format("launch.hosts[{}]", i),
          "write a name of letters, digits, '.', '_' and '-', and after a ':' its ranks if "
          "they differ from launch.ranks",
          "launch.hosts: {} is no host name", quote(host));
  }
}

}  // namespace

void validate(const LoadedConfig& loaded, Purpose purpose) {
  const Config& c = loaded.config;
  Rules rules(loaded);
  check_run(c, purpose, rules);
  check_model(c.model, rules);
  check_data(c, purpose, rules);
  check_training(c, rules);
  check_compression(c, rules);
  check_ranks(c, rules);
  rules.throw_if_any();
}

void validate_model(const ModelConfig& model, const std::string& name) {
  LoadedConfig loaded;
  loaded.sources.add_file(name, "");
  loaded.config.model = model;
  Rules rules(loaded);
  check_model(model, rules);
  rules.throw_if_any();
}

std::vector<std::string> config_warnings(const Config& c) {
  std::vector<std::string> warnings;
  const int64_t steps = c.train.steps, warmup = c.schedule.warmup.resolve(steps);
  if (steps > 0 && warmup > steps)
    warnings.push_back(fmt::format(
        "schedule.warmup ({}) is longer than train.steps ({}): the run ends during warm-up, at a "
        "learning rate of {:.1e} instead of optimizer.lr ({:.1e})",
        format_plural(warmup, "step"), steps,
        c.optimizer.lr * static_cast<double>(steps) / static_cast<double>(warmup), c.optimizer.lr));
  else if (steps > 0 && warmup == steps && c.schedule.name != ScheduleName::constant)
    warnings.push_back(fmt::format(
        "schedule.warmup ({}) takes the whole run: schedule.name {} has no step left to lower the "
        "learning rate",
        format_plural(warmup, "step"), enum_name(c.schedule.name)));
  if (c.model.n_routed_experts > 0 && c.model.first_k_dense_replace >= c.model.num_hidden_layers)
    warnings.push_back(fmt::format(
        "model.first_k_dense_replace ({}) leaves none of the {} to the {}",
        c.model.first_k_dense_replace, format_plural(c.model.num_hidden_layers, "block"),
        format_plural(c.model.n_routed_experts, "routed expert")));
  const bool may_take_topk =
      c.compression.method == CompressionMethod::automatic && c.compression.density > 0;
  if ((c.compression.method == CompressionMethod::topk || may_take_topk) &&
      !c.compression.error_feedback)
    warnings.push_back(
        fmt::format("compression.error_feedback is off: {}the {:.3g}% of each gradient's elements "
                    "that are not sent are lost for good",
                    may_take_topk ? "where auto takes topk, " : "",
                    100 * (1 - c.compression.density)));
  if (const std::optional<MeshShape> shape = planned_mesh(c))
    for (std::string& note : layout_notes(c, *shape)) warnings.push_back(std::move(note));
  return warnings;
}

int64_t data_parallel_ranks(const Config& c) {
  const std::optional<MeshShape> shape = planned_mesh(c);
  return shape ? shape->data : std::max<int64_t>(1, c.parallel.data.value);
}

bool is_safe_name(const std::string& name) {
  if (name.empty() || name.size() > 200 || name.front() == '-' || name.front() == '.' ||
      name.front() == ' ' || name.back() == ' ')
    return false;
  return std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return std::isalnum(c) || c >= 0x80 || c == '.' || c == '_' || c == '-' || c == '+' || c == ' ';
  });
}

}  // namespace dstrain
