// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with the context extensions of published
// DeepSeek and Llama configurations: linear interpolation (Chen et al. 2023, arXiv:2306.15595), YaRN
// (Peng et al. 2023, arXiv:2309.00071) and that of Llama 3.1.
#pragma once

#include <cstdint>
#include <vector>

#include "core/config/config.h"

namespace dstrain {

// Radians per position of each of the rope_dim / 2 pairs.
std::vector<double> rope_frequencies(const ModelConfig& model);
// Multiplies cos and sin.
double rope_attention_factor(const RopeScalingConfig& scaling);
// 1/sqrt(qk_dim), times the squared YaRN temperature where the model asks for it.
double attention_scale(const ModelConfig& model);

}  // namespace dstrain
