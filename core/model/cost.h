// What a model costs: parameters, and floating point operations per token. A matrix product of a weight
// with n elements counts 2n per token forward and 4n backward; causal attention counts the pairs it has
// to compute, at the full sequence length. Recomputation is not counted.
#pragma once

#include <cstdint>

#include "core/config/config.h"

namespace dstrain {

struct ModelCost {
  int64_t parameters_total = 0;   // trainable, multi-token prediction included
  int64_t parameters_active = 0;  // used by one token: its experts, one row of the embedding
  double flops_per_token = 0;     // forward and backward
};

ModelCost model_cost(const ModelConfig& model, int64_t seq_len);

}  // namespace dstrain
