#include "apps/layout_diagnosis.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>

namespace dstrain {
namespace {

constexpr double kSameRatio = 0.01;  // factors that are one factor, up to rounding and small sums

double norm_of(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return std::sqrt(sum);
}

// Not a number is the worst of all.
bool is_worse(const TensorFault& a, const TensorFault& b) {
  if (std::isnan(a.difference) || std::isnan(b.difference))
    return std::isnan(a.difference) && !std::isnan(b.difference);
  return a.difference > b.difference;
}

// "routed experts (12 of 12), norms (1 of 9)", those that are off as a whole first.
std::string list_classes(const std::vector<TensorFault>& faults, const LayoutRun& reference) {
  std::map<std::string, std::pair<int64_t, int64_t>> counts;  // off, all
  const std::string kind = "adamw.exp_avg.";
  for (const auto& [name, tensor] : reference.first_moments)
    ++counts[parameter_class(name.substr(kind.size()))].second;
  for (const TensorFault& fault : faults) ++counts[parameter_class(fault.name)].first;
  std::vector<std::string> whole, partly;
  for (const auto& [name, count] : counts) {
    if (count.first == 0) continue;
    (count.first == count.second ? whole : partly)
        .push_back(fmt::format("{} ({} of {})", name, count.first, count.second));
  }
  whole.insert(whole.end(), partly.begin(), partly.end());
  return fmt::format("{}", fmt::join(whole, ", "));
}

bool is_near(double a, double b) {
  return std::abs(a / b - 1) <= kSameRatio;
}

// The axis whose number of ranks explains a factor; "" if none does.
std::string axis_of(double ratio, const MeshShape& shape) {
  const double factor = ratio > 1 ? ratio : 1 / ratio;
  std::vector<std::string> axes;
  const int64_t copies = shape.expert_data();
  for (const auto& [name, size] : {std::pair<const char*, int64_t>{"data", shape.data},
                                   {"context", shape.context},
                                   {"tensor", shape.tensor},
                                   {"expert", shape.expert},
                                   {"pipeline", shape.pipeline}})
    if (size > 1 && is_near(factor, static_cast<double>(size)))
      axes.push_back(fmt::format("{} ({} ranks)", name, size));
  if (axes.empty() && copies > 1 && is_near(factor, static_cast<double>(copies)))
    axes.push_back(fmt::format("the {} ranks with the same experts", copies));
  return fmt::format("{}", fmt::join(axes, " or "));
}

// A factor alone: the direction of the gradient is right, and the norms differ by all of the
// difference.
bool is_scaled(const TensorFault& fault) {
  return std::abs(fault.ratio - 1) >= (1 - kSameRatio) * fault.difference;
}

std::string looks_like(const std::vector<TensorFault>& faults, bool is_all,
                       const MeshShape& shape) {
  const auto has_all = [&](auto&& holds) {
    return std::all_of(faults.begin(), faults.end(), holds);
  };
  if (!std::isfinite(faults[0].difference)) return "values that are not finite";
  const double ratio = faults[0].ratio;
  if (has_all([](const TensorFault& f) { return f.ratio < kSameRatio; }))
    return "gradients that are lost: nothing is added, or a sum takes place elsewhere";
  if (faults[0].difference < kSameRatio)
    return "rounding that is larger than it should be, or a small part that is missing";
  if (!has_all([&](const TensorFault& f) { return is_scaled(f) && is_near(f.ratio, ratio); }))
    return "no common factor: a sum over ranks that is missing for a part of them, rows in the "
           "wrong place, or other tokens";
  const std::string axis = axis_of(ratio, shape);
  std::string text = fmt::format("the factor {:.4g} on {}", ratio,
                                 is_all ? "every gradient" : "all of them alike");
  if (!axis.empty())
    text += fmt::format(", as many as there are ranks on {}: a sum that is made {}", axis,
                        ratio > 1 ? "once too often" : "over too few ranks");
  else if (is_all)
    text += ": a loss that is divided by another number of tokens";
  return text;
}

const LayoutCheck* find_check(const std::vector<LayoutCheck>& checks, const std::string& start) {
  const auto at = std::find_if(checks.begin(), checks.end(), [&](const LayoutCheck& check) {
    return check.name.starts_with(start) && !check.ok();
  });
  return at == checks.end() ? nullptr : &*at;
}

}  // namespace

std::string parameter_class(const std::string& name) {
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (has("embed_tokens")) return "embedding";
  if (has("lm_head") || has("shared_head.head")) return "head";
  if (has(".mlp.experts.")) return "routed experts";
  if (has(".mlp.shared_experts.")) return "shared experts";
  if (has(".mlp.gate.")) return "routers";
  if (has("norm")) return "norms";
  if (has(".mlp.")) return "dense feed-forward";
  if (has(".self_attn.")) return "attention";
  return "prediction modules";
}

std::vector<TensorFault> gradient_faults(const Config& config, const LayoutRun& reference,
                                         const LayoutRun& run, const LayoutTolerances& tolerances) {
  const auto expected = gradients_of(config, reference), got = gradients_of(config, run);
  const double floor = tolerances.gradient_floor * reference.steps.at(0).grad_norm;
  std::vector<TensorFault> faults;
  for (const auto& [name, g] : expected) {
    const std::vector<double>& other = got.at(name);
    std::vector<double> difference(g.size());
    for (size_t i = 0; i < g.size(); ++i) difference[i] = other[i] - g[i];
    const double size = std::max(norm_of(g), floor);
    const TensorFault fault{name, norm_of(difference) / size, norm_of(other) / size};
    if (!(fault.difference <= tolerances.gradient)) faults.push_back(fault);
  }
  std::stable_sort(faults.begin(), faults.end(), is_worse);
  return faults;
}

std::vector<std::string> diagnose(const Config& config, const LayoutRun& reference,
                                  const LayoutRun& run, const std::vector<LayoutCheck>& checks,
                                  const LayoutTolerances& tolerances) {
  std::vector<std::string> lines;
  for (const LayoutCheck& check : checks)
    if (!check.ok())
      lines.push_back(fmt::format("{}: {:.1e}, limit {:.0e}, at {}", check.name, check.worst,
                                  check.limit, check.where));
  if (lines.empty()) return lines;
  const std::vector<TensorFault> faults = gradient_faults(config, reference, run, tolerances);
  if (!faults.empty()) {
    const size_t all = reference.first_moments.size();
    lines.push_back(fmt::format("worst gradient: {}, norm {:.4g} times the reference's",
                                faults[0].name, faults[0].ratio));
    lines.push_back(fmt::format("{} of {} gradients are off: {}", faults.size(), all,
                                list_classes(faults, reference)));
    lines.push_back("looks like " + looks_like(faults, faults.size() == all, run.shape));
  } else if (find_check(checks, "gradient norm")) {
    lines.push_back(
        "looks like a norm that counts elements twice or not at all: the gradients themselves "
        "agree");
  } else if (find_check(checks, "copies")) {
    lines.push_back("looks like an update that does not reach every rank that holds a copy");
  } else if (find_check(checks, "margin")) {
    lines.push_back("looks like router scores that differ by more than rounding");
  } else {
    lines.push_back(
        "looks like a fault of the update, or of what comes after it: the first gradients agree");
  }
  return lines;
}

}  // namespace dstrain
