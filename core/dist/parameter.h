// Parameters: what each is globally, which slice a rank holds, and where it lies in the flat buffers
// that the optimizer, ZeRO and checkpoints work on.
//
// Trainable parameters are laid out block after block; inside a block one contiguous range per group
// (ranks that sum its gradients, weight decay or not). Values, gradients and both moments are parallel arrays with
// these offsets. Buffers (the router's balancing bias) have a range of their own and no gradient.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/backend/backend.h"
#include "core/dist/place.h"
#include "core/tensor/tensor.h"

namespace dstrain {

enum class Init { normal, ones, zeros };

// Which dim is cut over which mesh axis; -1 means replicated over that axis. A parameter is cut over one
// of them at most, into equal consecutive parts; `uneven` allows the last parts to be smaller or empty
// (a vocabulary of any size).
struct ShardSpec {
  int tensor_dim = -1;
  int expert_dim = -1;
  bool uneven = false;
};

// This rank's part of what ShardSpec names.
struct ShardPlace {
  AxisPlace tensor, expert;
};

// A parameter that the first and the last pipeline stage both hold (the embedding, as tied head or for
// multi-token prediction). Gradients are summed over both; norm, and checkpoint count the owner's.
enum class Tie { none, owner, copy };

struct ParameterSpec {
  std::string name;  // checkpoint name; Hugging Face's where one tensor corresponds to one tensor
  std::vector<int64_t> shape;  // global, up to four dims
  ShardSpec shard;
  Init init = Init::normal;
  double std = 0.02;       // of Init::normal
  bool weight_decay = true;
  bool trainable = true;
  Tie tie = Tie::none;
  int block = 0;  // 0 embedding, 1..L transformer blocks, L+1.. head and prediction modules
};

struct Parameter {
  ParameterSpec spec;
  std::vector<int64_t> local_shape;
  std::vector<int64_t> local_begin;  // per dim: where the local slice starts in the global tensor
  int64_t offset = 0;  // elements from the start of the flat trainable (or buffer) range
  Tensor value;        // set by ParameterSet::bind
  Tensor grad;         // f32 or f64; absent for buffers

  int64_t numel() const;         // of the local slice
  int64_t global_numel() const;
  // Of element i of the local slice, in the global tensor; both row-major.
  int64_t global_index(int64_t i) const;
  bool is_expert() const { return spec.shard.expert_dim >= 0; }
  bool is_tensor_cut() const { return spec.shard.tensor_dim >= 0; }
};

// Whose gradients are summed: copies of the same elements lie on these ranks of a pipeline stage.
enum class ReduceGroup {
  tensor_cut,  // all ranks with the same tensor rank: data x context
  replicated,  // all ranks of the stage: data x context x tensor
  expert,      // all ranks that hold the same experts
};

// A contiguous run of trainable parameters that are updated alike.
struct ParameterGroup {
  int block = 0;
  ReduceGroup reduce = ReduceGroup::replicated;
  bool weight_decay = false;
  int64_t begin = 0, end = 0;  // elements in the flat range
};

// Fills elements [begin, end) of the parameter's local slice (data: flat, so many elements) with their initial
// numbers, keyed by (seed, name, global index): every layout starts from the same model.
void initialize_elements(Ops& ops, Stream& stream, const Parameter& parameter, int64_t begin, int64_t end,
                         const Tensor& data, uint64_t seed);

class ParameterSet {
 public:
  // Elements between parameters; matrices of at least 128 x 128 start at 128 x 128 tiles.
  static constexpr int64_t kAlignment = 64, kTileAlignment = 128 * 128;

  // Adds a parameter. The reference stays valid for the life of the set. That the cut divides is checked.
  Parameter& declare(ParameterSpec spec, const ShardPlace& place = {});
  // Computes offsets and groups; no declare() after it.
  void finish_layout();

  std::deque<Parameter>& all() { return parameters_; }
  const std::deque<Parameter>& all() const { return parameters_; }
  Parameter* find(const std::string& name);
  const Parameter* find(const std::string& name) const;
  const std::vector<ParameterGroup>& groups() const { return groups_; }
  int64_t trainable_elements() const { return trainable_elements_; }
  int64_t buffer_elements() const { return buffer_elements_; }

  // Points every parameter into these arrays (trainable_elements() and buffer_elements() long).
  // grads may be absent for evaluation.
  void bind(const Tensor& values, const Tensor& grads, const Tensor& buffers);
  // Zeroes everything, then initialize_elements() of all. Values must be bound and whole.
  void initialize(Ops& ops, Stream& stream, uint64_t seed);

 private:
  std::deque<Parameter> parameters_;
  std::unordered_map<std::string, size_t> by_name_;  // place in parameters_
  std::vector<ParameterGroup> groups_;
  int64_t trainable_elements_ = 0, buffer_elements_ = 0;
  Tensor values_, buffers_;
  bool finished_ = false;
};

}  // namespace dstrain
