// How layers declare their parameters: a name prefix, a block and this rank's place on the axes that cut.
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
  ShardPlace place;
  Tie tie = Tie::none;  // of matrices

  Declare in(const std::string& name) const {
    Declare inner = *this;
    inner.prefix += name + ".";
    return inner;
  }
  Parameter& matrix(const std::string& name, std::vector<int64_t> shape, ShardSpec shard = {}) const {
    return set.declare({.name = prefix + name,
                        .shape = std::move(shape),
                        .shard = shard,
                        .init = Init::normal,
                        .std = std,
                        .weight_decay = true,
                        .trainable = true,
                        .tie = tie,
                        .block = block},
                       place);
  }
  Parameter& gain(const std::string& name, int64_t size) const {
    return set.declare({.name = prefix + name,
                        .shape = {size},
                        .shard = {},
                        .init = Init::ones,
                        .std = 0,
                        .weight_decay = false,
                        .trainable = true,
                        .tie = Tie::none,
                        .block = block});
  }
  Parameter& bias(const std::string& name, std::vector<int64_t> shape, ShardSpec shard = {}) const {
    return set.declare({.name = prefix + name,
                        .shape = std::move(shape),
                        .shard = shard,
                        .init = Init::zeros,
                        .std = 0,
                        .weight_decay = false,
                        .trainable = true,
                        .tie = Tie::none,
                        .block = block},
                       place);
  }
  Parameter& buffer(const std::string& name, int64_t size) const {
    return set.declare({.name = prefix + name,
                        .shape = {size},
                        .shard = {},
                        .init = Init::zeros,
                        .std = 0,
                        .weight_decay = false,
                        .trainable = false,
                        .tie = Tie::none,
                        .block = block});
  }
};

}  // namespace dstrain
