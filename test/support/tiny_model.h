// Small models and batches for tests of whole models. Sizes are odd where the architecture allows
// it, and weights are large enough that attention and routing are far from uniform.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/config/config.h"
#include "core/dist/parameter.h"
#include "core/engine/train_engine.h"

namespace dstrain::test {

// MLA with compressed queries, first layer dense; sigmoid router with groups and a bias, a shared
// expert, balance loss.
ModelConfig tiny_moe();
// MLA without query compression, MoE from the first layer on; softmax router, group-limited as in
// DeepSeek-V2, weights not normalised, two shared experts, balance loss, YaRN.
ModelConfig tiny_v2();
// Grouped-query attention with biases, tied head, dense.
ModelConfig tiny_dense();
// tiny_moe() with two multi-token prediction modules.
ModelConfig tiny_mtp();

struct BatchOptions {
  uint64_t seed = 1;
  int64_t sequences = 2;
  int64_t seq_len = 12;
  bool packed = false;  // several documents per sequence, which do not see each other
  double ignored = 0;   // share of targets that are masked
  int64_t padding = 0;  // last sequences without any target
};

// Host memory of some sequences. Targets are the next token of the same document; the last of a
// document has none.
class TinyBatch {
 public:
  TinyBatch(const ModelConfig& model, const BatchOptions& options);
  HostBatch host() const;
  int64_t sequences() const { return sequences_; }
  int64_t seq_len() const { return seq_len_; }
  int64_t valid_tokens() const;
  int64_t num_segments() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  // Sequences [begin, end) alone.
  TinyBatch part(int64_t begin, int64_t end) const;
  // One batch per `sequences` sequences.
  std::vector<TinyBatch> split(int64_t sequences) const;

  std::vector<int32_t> tokens, positions, targets;  // [sequences * seq_len]

 private:
  TinyBatch() = default;
  int64_t sequences_ = 0, seq_len_ = 0;
  std::vector<int32_t> offsets_;
};

// Makes everything that initialises to a constant random: gains about 1, biases and the router's
// bias about 0. Host memory only (CPU back end).
void randomize_constants(ParameterSet& parameters, uint64_t seed);

// Engine options for these micro-batches of `sequences` sequences each.
EngineOptions tiny_options(const std::vector<TinyBatch>& micro_batches, DType dtype = DType::f32,
                           Recompute recompute = Recompute::none);

// One optimizer step over micro-batches. The learning rate 0 changes the moments only.
StepResult run_step(TrainEngine& engine, const std::vector<TinyBatch>& micro_batches, double lr);
// engine.finish_step() and its result.
StepResult finish_step(TrainEngine& engine);
// The gradients of one step, which finish_step() may follow.
void run_gradients(TrainEngine& engine, const std::vector<TinyBatch>& micro_batches, double lr = 0);

// Hashes of host tensors, for comparisons of bits.
std::string bits_of(const Tensor& x);
std::string gradient_bits(const ParameterSet& parameters);  // a line per parameter
// Parameters, buffers and both moments, likewise.
std::string state_bits(TrainEngine& engine);
double element(const Tensor& x, int64_t i);
void set_element(const Tensor& x, int64_t i, double value);

}  // namespace dstrain::test
