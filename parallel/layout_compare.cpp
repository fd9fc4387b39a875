#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel/layout_run.h"

namespace dstrain {
namespace {

double norm_of(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return std::sqrt(sum);
}

// Keeps the larger value; the first NaN stays.
void note(LayoutCheck& check, double value, const std::string& where) {
  if (value <= check.worst || std::isnan(check.worst)) return;
  check.worst = value;
  check.where = where;
}

void compare_gradients(const Config& config, const LayoutRun& reference, const LayoutRun& run,
                       double floor, LayoutCheck& check) {
  const auto expected = gradients_of(config, reference), got = gradients_of(config, run);
  for (const auto& [name, g] : expected) {
    const auto at = got.find(name);
    DSTRAIN_CHECK(at != got.end() && at->second.size() == g.size(),
                  "the runs differ in '" + name + "'");
    std::vector<double> difference(g.size());
    for (size_t i = 0; i < g.size(); ++i) difference[i] = at->second[i] - g[i];
    const double size = std::max(norm_of(g), floor * reference.steps.at(0).grad_norm);
    note(check, norm_of(difference) / size, name);
  }
}

void compare_losses(const LayoutRun& reference, const LayoutRun& run, LayoutCheck& check) {
  for (size_t s = 0; s < reference.steps.size(); ++s) {
    const StepResult &a = reference.steps[s], &b = run.steps.at(s);
    const std::string where = "step " + std::to_string(s + 1);
    auto relative = [&](double expected, double got, const std::string& what) {
      if (expected != 0 || got != 0)
        note(check, std::abs(got - expected) / std::abs(expected), where + what);
    };
    relative(a.loss, b.loss, "");
    relative(a.mtp_loss, b.mtp_loss, ", prediction modules");
    relative(a.balance_loss, b.balance_loss, ", balance loss");
    if (run.replayed && a.expert_counts_LE != b.expert_counts_LE)
      note(check, INFINITY, where + ", tokens of experts");
  }
}

// Parameters after the last step, in what the learning rate lets an element move. Buffers, which
// count tokens, must be the same where the routing was.
void compare_parameters(const Config& config, const LayoutRun& reference, const LayoutRun& run,
                        LayoutCheck& check) {
  const double reach = config.optimizer.lr * static_cast<double>(reference.steps.size());
  for (const auto& [name, tensor] : reference.state) {
    if (!name.starts_with("param.")) continue;
    const std::string parameter = name.substr(6);
    const bool buffer = !reference.state.contains("adamw.exp_avg." + parameter);
    if (buffer && !run.replayed) continue;
    const std::vector<float>& values = run.state.at(name).values;
    double sum = 0;
    for (size_t i = 0; i < values.size(); ++i)
      sum += std::pow(double{values[i]} - tensor.values[i], 2);
    if (buffer)
      note(check, sum == 0 ? 0.0 : INFINITY, parameter);
    else
      note(check, std::sqrt(sum / static_cast<double>(values.size())) / reach, parameter);
  }
}

}  // namespace

// From first moments that were zero.
std::map<std::string, std::vector<double>> gradients_of(const Config& config,
                                                        const LayoutRun& run) {
  const std::string kind = "adamw.exp_avg.";
  const double clip = config.optimizer.grad_clip, norm = run.steps.at(0).grad_norm;
  const double scale = clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1.0;
  std::map<std::string, std::vector<double>> out;
  for (const auto& [name, tensor] : run.first_moments)
    for (const float m : tensor.values)
      out[name.substr(kind.size())].push_back(static_cast<double>(m) /
                                              (1 - config.optimizer.betas.first) / scale);
  return out;
}

std::vector<LayoutCheck> compare_layouts(const Config& config, const LayoutRun& reference,
                                         const LayoutRun& run, const LayoutTolerances& tolerances) {
  LayoutCheck gradient{"gradients of step 1", 0, tolerances.gradient, ""};
  LayoutCheck norm{"gradient norm of step 1", 0, tolerances.gradient, ""};
  LayoutCheck loss{"losses", 0, tolerances.loss, ""};
  LayoutCheck parameters{"parameters after the last step", 0, tolerances.parameter, ""};
  LayoutCheck margin{"margin of other routings", 0, tolerances.margin, ""};
  LayoutCheck copies{"copies on other ranks", 0, 0, ""};
  compare_gradients(config, reference, run, tolerances.gradient_floor, gradient);
  const double expected = reference.steps.at(0).grad_norm;
  note(norm, std::abs(run.steps.at(0).grad_norm - expected) / expected, "step 1");
  compare_losses(reference, run, loss);
  compare_parameters(config, reference, run, parameters);
  note(margin, run.flips.widest_margin, std::to_string(run.flips.tokens) + " tokens");
  if (!run.disagreement.empty()) note(copies, INFINITY, run.disagreement);
  return {gradient, norm, loss, parameters, margin, copies};
}

std::string bit_difference(const LayoutRun& a, const LayoutRun& b) {
  for (size_t s = 0; s < a.steps.size(); ++s)
    if (s >= b.steps.size() ||
        std::memcmp(&a.steps[s].loss, &b.steps[s].loss, sizeof(double)) != 0 ||
        std::memcmp(&a.steps[s].grad_norm, &b.steps[s].grad_norm, sizeof(double)) != 0)
      return "step " + std::to_string(s + 1);
  return bit_difference(a.state, b.state);
}

}  // namespace dstrain
