#include "apps/shrink_config.h"

#include <algorithm>
#include <array>
#include <bit>
#include <numeric>

namespace dstrain {
namespace {

int smallest_factor(int n) {
  for (int d = 2; d * d <= n; ++d)
    if (n % d == 0) return d;
  return n;
}

// The smallest number from `least` up that divides by the same part of `modulus` as `value`;
// `value` if that is not larger.
int64_t shrink_size(int64_t value, int64_t least, int64_t modulus) {
  int64_t small = least;
  while (small < value && std::gcd(small, modulus) != std::gcd(value, modulus)) ++small;
  return std::min(small, value);
}

int64_t odd_part(int64_t n) {
  while (n > 0 && n % 2 == 0) n /= 2;
  return n;
}

void shrink_attention(ModelConfig& m, int64_t modulus) {
  if (m.is_mla()) {
    m.num_attention_heads = shrink_size(m.num_attention_heads, 2, modulus);
    if (m.num_key_value_heads > 0) m.num_key_value_heads = m.num_attention_heads;
    m.kv_lora_rank = std::min<int64_t>(m.kv_lora_rank, 16);
    m.q_lora_rank = std::min<int64_t>(m.q_lora_rank, 24);
    m.qk_nope_head_dim = std::min<int64_t>(m.qk_nope_head_dim, 8);
    m.qk_rope_head_dim = std::min<int64_t>(m.qk_rope_head_dim, 4);
    m.v_head_dim = std::min<int64_t>(m.v_head_dim, 6);
    if (m.head_dim > 0) m.head_dim = m.qk_rope_head_dim;
    m.hidden_size = std::min<int64_t>(m.hidden_size, 32);
    return;
  }
  const int64_t width = std::min<int64_t>(m.gqa_head_dim(), 4);
  const int64_t per_group = std::min<int64_t>(m.num_attention_heads / m.kv_heads(), 2);
  const int64_t groups = shrink_size(m.kv_heads(), 2, modulus);
  m.num_attention_heads = groups * per_group;
  if (m.num_key_value_heads > 0) m.num_key_value_heads = groups;
  if (m.head_dim > 0) {
    m.head_dim = width;
    m.hidden_size = std::min<int64_t>(m.hidden_size, 32);
  } else {
    m.hidden_size = m.num_attention_heads * width;
  }
}

// Groups of experts and experts per group. Group-limited routing needs two per group, and a token's
// experts in the groups that it may use; the loops end at the model's own numbers at the latest.
void shrink_experts(ModelConfig& m, int64_t modulus) {
  if (m.n_routed_experts == 0) return;
  const int64_t experts = m.n_routed_experts, groups = m.n_group, used = m.topk_group;
  const int64_t choices = std::min<int64_t>(m.num_experts_per_tok, 3);
  const int64_t least = std::min(experts, std::max<int64_t>(8, 2 * choices));
  for (int64_t n = std::min<int64_t>(groups, 4); n <= groups; ++n) {
    const int64_t kept = std::clamp<int64_t>(used * n / groups, 1, n);
    for (int64_t size = std::min<int64_t>(2, experts / groups); size <= experts / groups; ++size) {
      if (n * size < least || kept * size < choices) continue;
      if (std::gcd(n * size, modulus) != std::gcd(experts, modulus)) continue;
      m.n_routed_experts = n * size;
      m.n_group = n;
      m.topk_group = kept;
      m.num_experts_per_tok = choices;
      return;
    }
  }
}

void shrink_widths(ModelConfig& m, int64_t modulus) {
  m.intermediate_size = shrink_size(m.intermediate_size, 40, modulus);
  const int64_t width = m.moe_intermediate_size, shared = m.n_shared_experts;
  if (shared == 0) {
    m.moe_intermediate_size = std::min<int64_t>(width, 16);
    return;
  }
  // Ranks share the width of all shared experts together; the model's own numbers fit at the
  // latest.
  for (int64_t count = std::min<int64_t>(shared, 2); count <= shared; ++count)
    for (int64_t small = std::min<int64_t>(width, 16); small <= width; ++small)
      if (std::gcd(count * small, modulus) == std::gcd(shared * width, modulus)) {
        m.n_shared_experts = count;
        m.moe_intermediate_size = small;
        return;
      }
}

int64_t count_moe_layers(const ModelConfig& m) {
  int64_t count = 0;
  for (int64_t layer = 0; layer < m.num_hidden_layers; ++layer) count += m.is_moe_layer(layer);
  return count;
}

// Enough for the pipeline, with two blocks of each kind that the model has, and odd if it was:
// uneven stages are a case of their own.
void shrink_layers(ModelConfig& m, int64_t chunks) {
  const ModelConfig large = m;
  const int64_t moe = count_moe_layers(large), dense = large.num_hidden_layers - moe;
  m.first_k_dense_replace = std::min<int64_t>(m.first_k_dense_replace, 1);
  m.moe_layer_freq = std::min<int64_t>(m.moe_layer_freq, 2);
  m.num_hidden_layers = std::min(large.num_hidden_layers, std::max<int64_t>(chunks, 3));
  const auto is_enough = [&] {
    const int64_t small_moe = count_moe_layers(m);
    return small_moe >= std::min<int64_t>(moe, 2) &&
           m.num_hidden_layers - small_moe >= std::min<int64_t>(dense, 1) &&
           m.num_hidden_layers % 2 == large.num_hidden_layers % 2;
  };
  while (m.num_hidden_layers < large.num_hidden_layers && !is_enough()) ++m.num_hidden_layers;
  m.num_nextn_predict_layers = std::min<int64_t>(m.num_nextn_predict_layers, 2);
}

// Sequences are cut by context parallelism in two pieces per rank, the tokens of a micro-batch by
// tensor parallelism as well, and micro-batches of a step go to data-parallel ranks and,
// interleaved, in rounds to pipeline stages.
void shrink_batch(Config& c, const MeshShape& own, int64_t powers, int64_t modulus) {
  const int64_t tokens = c.train.micro_batch * c.data.seq_len, most = c.train.micro_batch;
  c.data.seq_len = shrink_size(c.data.seq_len, 16, 2 * powers * odd_part(own.context));
  c.train.micro_batch = std::min<int64_t>(most, 2);
  while (c.train.micro_batch < most &&
         std::gcd(c.train.micro_batch * c.data.seq_len, modulus) != std::gcd(tokens, modulus))
    ++c.train.micro_batch;
  const int64_t turns = powers * odd_part(int64_t{own.data} * own.pipeline);
  c.train.global_batch = 3 * turns * c.train.micro_batch;
}

}  // namespace

MeshShape shrink_shape(const MeshShape& shape, int64_t ranks) {
  MeshShape small;
  const std::array<int MeshShape::*, 4> axes = {&MeshShape::pipeline, &MeshShape::tensor,
                                                &MeshShape::context, &MeshShape::data};
  const auto grow = [&](int MeshShape::*axis) {
    const int factor = smallest_factor(shape.*axis / small.*axis);
    if (factor > 1 && small.ranks() * factor <= ranks) small.*axis *= factor;
    return small;
  };
  for (const auto axis : axes) grow(axis);
  for (MeshShape before; before != small;) {
    before = small;
    for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) grow(*axis);
  }
  const int64_t stage = small.stage_ranks();
  small.expert = static_cast<int>(std::gcd(int64_t{shape.expert}, stage));
  const int part = small.expert / smallest_factor(small.expert);
  if (small.expert == stage && shape.expert < shape.stage_ranks() && part > 1) small.expert = part;
  return small;
}

Config shrink_config(const Config& config, const MeshShape& own, int64_t ranks) {
  Config c = config;
  // What sizes keep dividing by: layouts of factors 2 on up to `ranks` ranks, and the own one.
  const int64_t powers = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(ranks)));
  const int64_t modulus = powers * odd_part(own.ranks());
  ModelConfig& m = c.model;
  m.preset.clear();
  m.from.clear();
  m.vocab_size = m.vocab_size == 0 ? 97 : shrink_size(m.vocab_size, 96, 2 * modulus);
  shrink_attention(m, modulus);
  m.initializer_range = 0.1;  // narrow sums need larger weights, or all gradients are tiny
  shrink_experts(m, modulus);
  shrink_widths(m, modulus);
  if (c.parallel.schedule == PipelineOrder::interleaved) c.parallel.virtual_stages = 2;
  shrink_layers(m, std::max(2, own.pipeline) * c.parallel.virtual_stages);
  shrink_batch(c, own, powers, modulus);
  if (c.optimizer.grad_clip > 0) c.optimizer.grad_clip = std::min(c.optimizer.grad_clip, 0.25);
  c.optimizer.lr = 2e-3;  // a few steps change the losses
  c.run.device = Device::cpu;
  c.precision = {};
  c.compression = {};
  c.launch = {};
  return with_shape(c, own);
}

}  // namespace dstrain
