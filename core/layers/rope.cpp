#include "core/layers/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace dstrain {
namespace {

double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

// The pair whose wavelength makes `rotations` turns within the original context.
double correction_dim(double rotations, double rope_dim, double theta, double original_positions) {
  return rope_dim * std::log(original_positions / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(theta));
}

// How far each frequency is stretched: 0 keeps it, 1 divides it by the factor.
std::vector<double> yarn_ramp(const ModelConfig& model, size_t pairs) {
  const RopeScalingConfig& scaling = model.rope_scaling;
  const double rope_dim = static_cast<double>(model.rope_dim());
  const double original = static_cast<double>(scaling.original_max_position_embeddings);
  const double low = std::max(
      std::floor(correction_dim(scaling.beta_fast, rope_dim, model.rope_theta, original)), 0.0);
  double high =
      std::min(std::ceil(correction_dim(scaling.beta_slow, rope_dim, model.rope_theta, original)),
               rope_dim - 1);
  if (low == high) high += 0.001;
  std::vector<double> ramp(pairs);
  for (size_t i = 0; i < pairs; ++i)
    ramp[i] = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
  return ramp;
}

// Llama 3.1 ramps over the turns that a pair makes within the original context, YaRN over its index.
std::vector<double> llama3_ramp(const RopeScalingConfig& scaling,
                                const std::vector<double>& frequency) {
  const double original = static_cast<double>(scaling.original_max_position_embeddings);
  std::vector<double> ramp;
  for (const double f : frequency) {
    const double rotations = original * f / (2 * std::numbers::pi);
    ramp.push_back(std::clamp((scaling.high_freq_factor - rotations) /
                                  (scaling.high_freq_factor - scaling.low_freq_factor),
                              0.0, 1.0));
  }
  return ramp;
}

}  // namespace

std::vector<double> rope_frequencies(const ModelConfig& model) {
  const double rope_dim = static_cast<double>(model.rope_dim());
  const RopeScalingConfig& scaling = model.rope_scaling;
  std::vector<double> frequency(static_cast<size_t>(model.rope_dim() / 2));
  for (size_t i = 0; i < frequency.size(); ++i)
    frequency[i] = std::pow(model.rope_theta, -2.0 * static_cast<double>(i) / rope_dim);
  if (scaling.type == RopeType::none) return frequency;

  const std::vector<double> ramp =
      scaling.type == RopeType::yarn     ? yarn_ramp(model, frequency.size())
      : scaling.type == RopeType::llama3 ? llama3_ramp(scaling, frequency)
                                         : std::vector<double>(frequency.size(), 1.0);
  for (size_t i = 0; i < frequency.size(); ++i)
    frequency[i] = frequency[i] * (1 - ramp[i]) + frequency[i] / scaling.factor * ramp[i];
  return frequency;
}

double rope_attention_factor(const RopeScalingConfig& scaling) {
  if (scaling.type != RopeType::yarn) return 1.0;
  if (scaling.attention_factor > 0) return scaling.attention_factor;
  if (scaling.mscale > 0 && scaling.mscale_all_dim > 0)
    return yarn_mscale(scaling.factor, scaling.mscale) /
           yarn_mscale(scaling.factor, scaling.mscale_all_dim);
  return yarn_mscale(scaling.factor, 1.0);
}

double attention_scale(const ModelConfig& model) {
  double scale = 1.0 / std::sqrt(static_cast<double>(model.qk_dim()));
  const RopeScalingConfig& scaling = model.rope_scaling;
  if (model.is_mla() && scaling.type != RopeType::none && scaling.mscale_all_dim > 0) {
    const double mscale = yarn_mscale(scaling.factor, scaling.mscale_all_dim);
    scale *= mscale * mscale;
  }
  return scale;
}

}  // namespace dstrain
