#include "test/support/tiny_model.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "core/base/rng.h"

namespace dstrain::test {
namespace {

enum Purpose : uint64_t { kTokens = 1, kDocuments, kMask, kConstants };

ModelConfig tiny_mla() {
  ModelConfig m;
  m.vocab_size = 37;
  m.hidden_size = 24;
  m.num_hidden_layers = 2;
  m.intermediate_size = 28;
  m.moe_intermediate_size = 11;
  m.num_attention_heads = 3;
  m.kv_lora_rank = 10;
  m.qk_nope_head_dim = 6;
  m.qk_rope_head_dim = 4;
  m.v_head_dim = 7;
  m.max_position_embeddings = 256;
  m.initializer_range = 0.25;
  m.n_routed_experts = 8;
  m.bias_update_speed = 0;
  return m;
}

}  // namespace

ModelConfig tiny_moe() {
  ModelConfig m = tiny_mla();
  m.q_lora_rank = 9;
  m.n_shared_experts = 1;
  m.num_experts_per_tok = 3;
  m.n_group = 4;
  m.topk_group = 2;
  m.routed_scaling_factor = 1.7;
  m.aux_loss_alpha = 0.3;
  return m;
}

ModelConfig tiny_v2() {
  ModelConfig m = tiny_mla();
  m.first_k_dense_replace = 0;
  m.n_shared_experts = 2;
  m.num_experts_per_tok = 2;
  m.n_group = 2;
  m.topk_group = 1;
  m.scoring_func = ScoringFunc::softmax;
  m.topk_method = TopkMethod::group_limited_greedy;
  m.norm_topk_prob = false;
  m.routed_scaling_factor = 1.3;
  m.aux_loss_alpha = 0.2;
  m.rope_scaling.type = RopeType::yarn;
  m.rope_scaling.factor = 4;
  m.rope_scaling.original_max_position_embeddings = 8;
  m.rope_scaling.mscale = 0.7;
  m.rope_scaling.mscale_all_dim = 1.1;
  return m;
}

ModelConfig tiny_dense() {
  ModelConfig m;
  m.vocab_size = 41;
  m.hidden_size = 20;
  m.num_hidden_layers = 2;
  m.intermediate_size = 27;
  m.num_attention_heads = 4;
  m.num_key_value_heads = 2;
  m.head_dim = 6;
  m.attention_bias = true;
  m.tie_word_embeddings = true;
  m.max_position_embeddings = 256;
  m.initializer_range = 0.25;
  return m;
}

ModelConfig tiny_mtp() {
  ModelConfig m = tiny_moe();
  m.num_hidden_layers = 1;
  m.first_k_dense_replace = 0;
  m.num_nextn_predict_layers = 2;
  m.mtp_loss_weight = 0.6;
  return m;
}

TinyBatch::TinyBatch(const ModelConfig& model, const BatchOptions& options)
    : sequences_(options.sequences), seq_len_(options.seq_len), offsets_{0} {
  const int64_t T = sequences_ * seq_len_;
  auto draw = [&](Purpose purpose, int64_t i, int64_t below) {
    return static_cast<int32_t>(random_uniform(options.seed, purpose, static_cast<uint64_t>(i)) *
                                static_cast<double>(below));
  };
  for (int64_t t = 0; t < T; ++t) {
    tokens.push_back(draw(kTokens, t, model.vocab_size));
    const bool ends = (t + 1) % seq_len_ == 0 || (options.packed && draw(kDocuments, t, 5) == 0);
    positions.push_back(static_cast<int32_t>(t - offsets_.back()));
    const bool masked =
        random_uniform(options.seed, kMask, static_cast<uint64_t>(t)) < options.ignored;
    const bool padded = t / seq_len_ >= sequences_ - options.padding;
    // Replaced by the next token below.
    targets.push_back(ends || masked || padded ? -1 : 0);
    if (ends) offsets_.push_back(static_cast<int32_t>(t + 1));
  }
  for (size_t t = 0; t + 1 < targets.size(); ++t)
    if (targets[t] == 0) targets[t] = tokens[t + 1];
}

HostBatch TinyBatch::host() const {
  return {sequences_,     seq_len_,        tokens.data(), positions.data(),
          targets.data(), offsets_.data(), num_segments()};
}

int64_t TinyBatch::valid_tokens() const {
  return std::count_if(targets.begin(), targets.end(), [](int32_t t) { return t >= 0; });
}

TinyBatch TinyBatch::part(int64_t begin, int64_t end) const {
  TinyBatch out;
  const int64_t first = begin * seq_len_, last = end * seq_len_;
  auto cut = [&](const std::vector<int32_t>& all) {
    return std::vector<int32_t>(all.begin() + first, all.begin() + last);
  };
  out.tokens = cut(tokens);
  out.positions = cut(positions);
  out.targets = cut(targets);
  out.sequences_ = end - begin;
  out.seq_len_ = seq_len_;
  for (const int32_t offset : offsets_)
    if (offset >= first && offset <= last)
      out.offsets_.push_back(static_cast<int32_t>(offset - first));
  return out;
}

std::vector<TinyBatch> TinyBatch::split(int64_t sequences) const {
  std::vector<TinyBatch> parts;
  for (int64_t begin = 0; begin < sequences_; begin += sequences)
    parts.push_back(part(begin, begin + sequences));
  return parts;
}

void randomize_constants(ParameterSet& parameters, uint64_t seed) {
  for (const Parameter& p : parameters.all()) {
    if (p.spec.init == Init::normal) continue;
    const double mean = p.spec.init == Init::ones ? 1 : 0;
    const uint64_t stream = kConstants + stream_id(p.spec.name.data(), p.spec.name.size());
    for (int64_t i = 0; i < p.numel(); ++i)
      set_element(p.value, i, mean + 0.1 * random_normal(seed, stream, static_cast<uint64_t>(i)));
  }
}

EngineOptions tiny_options(const std::vector<TinyBatch>& micro_batches, DType dtype,
                           Recompute recompute) {
  EngineOptions o;
  o.dtype = dtype;
  o.micro_batch = micro_batches.at(0).sequences();
  o.seq_len = micro_batches.at(0).seq_len();
  o.global_batch = o.micro_batch * std::ssize(micro_batches);
  o.recompute = recompute;
  return o;
}

void run_gradients(TrainEngine& engine, const std::vector<TinyBatch>& micro_batches, double lr) {
  int64_t valid = 0;
  for (const TinyBatch& batch : micro_batches) valid += batch.valid_tokens();
  engine.begin_step(lr, valid);
  for (const TinyBatch& batch : micro_batches) engine.accumulate(batch.host());
  engine.reduce_gradients();
}

StepResult run_step(TrainEngine& engine, const std::vector<TinyBatch>& micro_batches, double lr) {
  run_gradients(engine, micro_batches, lr);
  return finish_step(engine);
}

StepResult finish_step(TrainEngine& engine) {
  engine.finish_step();
  return engine.take_result();
}

std::string bits_of(const Tensor& x) {
  DSTRAIN_CHECK(x.contiguous(), "bits of a strided tensor");
  char text[20];
  std::snprintf(text, sizeof text, "%016" PRIx64,
                stream_id(static_cast<const char*>(x.raw()), static_cast<uint64_t>(x.bytes())));
  return text;
}

std::string gradient_bits(const ParameterSet& parameters) {
  std::string lines;
  for (const Parameter& p : parameters.all())
    if (p.spec.trainable) lines += p.spec.name + " " + bits_of(p.grad) + "\n";
  return lines;
}

std::string state_bits(TrainEngine& engine) {
  std::string lines;
  for (const StateSlice& slice : engine.saved_state())
    lines += slice.kind + " " + slice.parameter->spec.name + " " + bits_of(slice.data) + "\n";
  return lines;
}

double element(const Tensor& x, int64_t i) {
  return x.dtype() == DType::f64 ? x.data<double>()[i] : static_cast<double>(x.data<float>()[i]);
}

void set_element(const Tensor& x, int64_t i, double value) {
  if (x.dtype() == DType::f64)
    x.data<double>()[i] = value;
  else
    x.data<float>()[i] = static_cast<float>(value);
}

}  // namespace dstrain::test
