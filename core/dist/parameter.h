// Parameters: what each is globally, which slice a rank holds, and where it lies in the flat buffers
// that the optimizer, ZeRO and checkpoints work on.
//
// Trainable parameters are laid out block after block; inside a block one contiguous range per group
// (weight decay or not, dense or expert). Values, gradients and both moments are parallel arrays with
// these offsets. Buffers (the router's balancing bias) have a range of their own and no gradient.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "core/backend/backend.h"
#include "core/tensor/tensor.h"

namespace dstrain {

enum class Init { normal, ones, zeros };

// Which dims are cut over which mesh axis; -1 means replicated over that axis. Any cut is into equal
// consecutive parts.
struct ShardSpec {
  int tensor_dim = -1;
  int expert_dim = -1;
};

struct ParameterSpec {
  std::string name;  // checkpoint name; Hugging Face's where one tensor corresponds to one tensor
  std::vector<int64_t> shape;  // global, up to four dims
  ShardSpec shard;
  Init init = Init::normal;
  double std = 0.02;       // of Init::normal
  bool weight_decay = true;
  bool trainable = true;
  int block = 0;  // 0 embedding, 1..L transformer blocks, L+1.. head and prediction modules
};

struct Parameter {
  ParameterSpec spec;
  std::vector<int64_t> local_shape;
  int64_t offset = 0;  // elements from the start of the flat trainable (or buffer) range
  Tensor value;        // set by ParameterSet::bind
  Tensor grad;         // f32 or f64; absent for buffers

  int64_t numel() const;         // of the local slice
  int64_t global_numel() const;
  bool is_expert() const { return spec.shard.expert_dim >= 0; }
};

// A contiguous run of trainable parameters that are updated alike.
struct ParameterGroup {
  int block = 0;
  bool weight_decay = false;
  bool expert = false;
  int64_t begin = 0, end = 0;  // elements in the flat range
};

class ParameterSet {
 public:
  // Elements between parameters; matrices of at least 128 x 128 start at 128 x 128 tiles.
  static constexpr int64_t kAlignment = 64, kTileAlignment = 128 * 128;

  // Adds a parameter. The reference stays valid for the life of the set. tensor_ranks and expert_ranks
  // divide the dims that the spec names (checked).
  Parameter& declare(ParameterSpec spec, int64_t tensor_ranks = 1, int64_t expert_ranks = 1);
  // Computes offsets and groups; no declare() after it.
  void finish_layout();

  std::deque<Parameter>& all() { return parameters_; }
  const std::deque<Parameter>& all() const { return parameters_; }
  Parameter* find(const std::string& name);
  const std::vector<ParameterGroup>& groups() const { return groups_; }
  int64_t trainable_elements() const { return trainable_elements_; }
  int64_t buffer_elements() const { return buffer_elements_; }

  // Points every parameter into these arrays (trainable_elements() and buffer_elements() long).
  // grads may be absent for evaluation.
  void bind(const Tensor& values, const Tensor& grads, const Tensor& buffers);
  // Zeroes everything and fills values with their initial numbers, keyed by (seed, name, global index).
  void initialize(Ops& ops, Stream& stream, uint64_t seed);

 private:
  std::deque<Parameter> parameters_;
  std::vector<ParameterGroup> groups_;
  int64_t trainable_elements_ = 0, buffer_elements_ = 0;
  Tensor values_, buffers_;
  bool finished_ = false;
};

}  // namespace dstrain
