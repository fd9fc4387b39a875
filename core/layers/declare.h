// How layers declare their parameters: a name prefix, a block and the ranks that dims divide over.
#pragma once

#include <string>
#include <vector>

#include "core/dist/parameter.h"

namespace dstrain {

struct Declare {
  ParameterSet& set;
  std::string prefix;  // "model.layers.0.self_attn."
  int block = 0;
  double std = 0.02;
  int64_t tensor_ranks = 1;
  int64_t expert_ranks = 1;

  Declare in(const std::string& name) const {
    Declare inner = *this;
    inner.prefix += name + ".";
    return inner;
  }
  Parameter& matrix(const std::string& name, std::vector<int64_t> shape, ShardSpec shard = {}) const {
    return set.declare({prefix + name, std::move(shape), shard, Init::normal, std, true, true, block},
                       tensor_ranks, expert_ranks);
  }
  Parameter& gain(const std::string& name, int64_t size) const {
    return set.declare({prefix + name, {size}, {}, Init::ones, 0, false, true, block});
  }
  Parameter& bias(const std::string& name, std::vector<int64_t> shape, ShardSpec shard = {}) const {
    return set.declare({prefix + name, std::move(shape), shard, Init::zeros, 0, false, true, block},
                       tensor_ranks, expert_ranks);
  }
  Parameter& buffer(const std::string& name, int64_t size) const {
    return set.declare({prefix + name, {size}, {}, Init::zeros, 0, false, false, block});
  }
};

}  // namespace dstrain
