// Finding layouts: from the job file, and the legal ones next to what it asks for.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "core/base/error.h"
#include "core/base/format_units.h"
#include "core/config/launch_hosts.h"
#include "core/config/layout.h"

namespace dstrain {
namespace {

constexpr size_t kNearShown = 3;
constexpr int64_t kMostRanks = std::numeric_limits<int>::max();

std::vector<int> divisors(int64_t n) {
  std::vector<int> all;
  for (int64_t d = 1; d * d <= n; ++d) {
    if (n % d != 0) continue;
    all.push_back(static_cast<int>(d));
    if (d * d != n) all.push_back(static_cast<int>(n / d));
  }
  std::sort(all.begin(), all.end());
  return all;
}

// How far a layout is from what `parallel` asks for: doublings and halvings over all axes. An axis
// that is not in use yet counts one more.
double distance(const ParallelConfig& wanted, const MeshShape& shape) {
  const auto apart = [](int64_t from, int to) {
    const double steps = std::abs(std::log2(static_cast<double>(to) / static_cast<double>(from)));
    return from == 1 && to > 1 ? steps + 1 : steps;
  };
  return apart(wanted.pipeline, shape.pipeline) + apart(wanted.context, shape.context) +
         apart(wanted.tensor, shape.tensor) + apart(wanted.expert, shape.expert) +
         (wanted.data.is_auto() ? 0 : apart(wanted.data.value, shape.data));
}

// The legal layouts nearest to `parallel`, as text; empty if there are none. Those that differ in
// `expert` alone count as one.
std::string near_layouts(const Config& c, int64_t ranks) {
  std::vector<std::pair<double, MeshShape>> near;
  const auto same_axes = [](MeshShape a, const MeshShape& b) {
    a.expert = b.expert;
    return a == b;
  };
  for (const MeshShape& shape : legal_shapes(c, ranks)) {
    const std::pair candidate{distance(c.parallel, shape), shape};
    if (near.empty() || !same_axes(near.back().second, shape))
      near.push_back(candidate);
    else if (candidate.first < near.back().first)
      near.back() = candidate;
  }
  std::stable_sort(near.begin(), near.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  if (near.size() > kNearShown) near.resize(kNearShown);
  std::vector<std::string> texts;
  for (const auto& [far, shape] : near) texts.push_back(to_text(shape));
  return fmt::format("{}", fmt::join(texts, "; "));
}

std::string near_hint(const Config& c, int64_t ranks) {
  const std::string near = near_layouts(c, ranks);
  if (!near.empty()) return "legal near it: " + near;
  return fmt::format(
      "no layout of {} is legal for this model and batch; use another number of ranks",
      format_plural(ranks, "rank"));
}

// The axes in use, with data even where it is auto: "data auto x tensor 3".
std::string asked_text(const ParallelConfig& p) {
  std::string text = "data " + (p.data.is_auto() ? "auto" : fmt::to_string(p.data.value));
  for (const auto& [name, size] :
       {std::pair{"tensor", p.tensor}, {"pipeline", p.pipeline}, {"context", p.context}})
    if (size > 1) text += fmt::format(" x {} {}", name, size);
  return text;
}

MeshShape shape_of(const ParallelConfig& p, int64_t data) {
  return {static_cast<int>(p.pipeline), static_cast<int>(data), static_cast<int>(p.context),
          static_cast<int>(p.tensor), static_cast<int>(p.expert)};
}

// Exact far beyond any number of ranks.
double product_without_data(const ParallelConfig& p) {
  return static_cast<double>(p.pipeline) * static_cast<double>(p.context) *
         static_cast<double>(p.tensor);
}

}  // namespace

std::optional<MeshShape> mesh_over(const ParallelConfig& p, int64_t ranks) {
  if (ranks < 1 || ranks > kMostRanks || product_without_data(p) > static_cast<double>(ranks))
    return std::nullopt;
  const int64_t model_ranks = p.pipeline * p.context * p.tensor, data = ranks / model_ranks;
  if (data * model_ranks != ranks || (!p.data.is_auto() && data != p.data.value))
    return std::nullopt;
  return shape_of(p, data);
}

LayoutProblem misfit(const Config& c, int64_t ranks) {
  const ParallelConfig& p = c.parallel;
  const double others = product_without_data(p);
  const std::string asked = asked_text(p);
  std::string message;
  if (p.data.is_auto())
    message = fmt::format("the layout {} needs a multiple of {:.0f} ranks, but the job has {}",
                          asked, others, ranks);
  else
    message = fmt::format(
        "the layout {}{} does not use {}", asked,
        others > 1 ? fmt::format(" = {:.0f}", others * static_cast<double>(p.data.value)) : "",
        format_plural(ranks, "rank"));
  return {"launch.ranks", message, near_hint(c, ranks)};
}

MeshShape resolve_mesh(const Config& c, int64_t ranks) {
  const std::optional<MeshShape> shape = mesh_over(c.parallel, ranks);
  if (!shape) {
    const LayoutProblem problem = misfit(c, ranks);
    throw ConfigError(problem.message + "\nhint: " + problem.hint);
  }
  Config given = c;
  given.launch.hosts.clear();
  given.launch.ranks.value = ranks;
  const std::vector<LayoutProblem> problems = check_layout(given, *shape);
  if (problems.empty()) return *shape;
  std::string text = fmt::format("the layout {} of {} is not legal:", to_text(*shape),
                                 format_plural(ranks, "rank"));
  for (const LayoutProblem& problem : problems)
    text += fmt::format("\n  {} ({})", problem.message, problem.hint);
  throw ConfigError(text + "\nhint: " + near_hint(c, ranks));
}

std::vector<MeshShape> legal_shapes(const Config& c, int64_t ranks) {
  std::vector<MeshShape> legal;
  if (ranks < 1 || ranks > kMostRanks) return legal;
  for (const int pipeline : divisors(ranks)) {
    const int64_t stage_ranks = ranks / pipeline;
    for (const int data : divisors(stage_ranks))
      for (const int context : divisors(stage_ranks / data)) {
        const int tensor = static_cast<int>(stage_ranks / data / context);
        if (!check_layout(c, {pipeline, data, context, tensor, 1}).empty()) continue;
        for (const int expert : divisors(std::gcd(c.model.n_routed_experts, stage_ranks))) {
          const MeshShape shape{pipeline, data, context, tensor, expert};
          if (check_layout(c, shape).empty()) legal.push_back(shape);
        }
      }
  }
  return legal;
}

Config with_shape(Config c, const MeshShape& shape) {
  c.parallel.pipeline = shape.pipeline;
  c.parallel.data.value = shape.data;
  c.parallel.context = shape.context;
  c.parallel.tensor = shape.tensor;
  c.parallel.expert = shape.expert;
  return c;
}

int64_t launch_ranks(const LaunchConfig& launch) {
  if (launch.hosts.empty()) return launch.ranks.value;
  int64_t total = 0;
  for (const std::string& text : launch.hosts) {
    const std::optional<LaunchHost> host = parse_launch_host(text);
    const int64_t ranks = host && host->ranks > 0 ? host->ranks : launch.ranks.value;
    if (ranks == 0) return 0;
    total += ranks;
  }
  return total;
}

MeshShape smallest_mesh(const Config& c) {
  const ParallelConfig& p = c.parallel;
  if (!p.data.is_auto()) return shape_of(p, p.data.value);
  // Experts must divide the ranks of a stage, so that data is a multiple of what the others lack.
  const bool experts_fit = c.model.n_routed_experts > 0 && c.model.n_routed_experts % p.expert == 0;
  return shape_of(p, experts_fit ? p.expert / std::gcd(p.expert, p.context * p.tensor) : 1);
}

std::optional<MeshShape> planned_mesh(const Config& c) {
  if (launch_ranks(c.launch) == 0) return smallest_mesh(c);
  return mesh_over(c.parallel, launch_ranks(c.launch));
}

}  // namespace dstrain
