// The mesh as a few lines for people.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/base/format_units.h"
#include "parallel/layer_split.h"
#include "parallel/mesh.h"

namespace dstrain {
namespace {

// "0-3", "0 4", "0 4 8 .. 28": runs of a constant step are cut short, those of step 1 most.
std::string list_ranks(const std::vector<int>& ranks) {
  const size_t n = ranks.size();
  bool is_even = true;
  for (size_t i = 2; i < n; ++i) is_even &= ranks[i] - ranks[i - 1] == ranks[1] - ranks[0];
  if (n > 1 && is_even && ranks[1] == ranks[0] + 1)
    return fmt::format("{}-{}", ranks.front(), ranks.back());
  if (n > 4 && is_even)
    return fmt::format("{} {} {} .. {}", ranks[0], ranks[1], ranks[2], ranks.back());
  return fmt::format("{}", fmt::join(ranks, " "));
}

// "{0-3} {4-7} .. {60-63}"
std::string list_groups(const std::vector<std::vector<int>>& groups) {
  std::string text;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (groups.size() > 4 && i == 2) {
      text += " ..";
      i = groups.size() - 1;
    }
    text += fmt::format("{}{{{}}}", text.empty() ? "" : " ", list_ranks(groups[i]));
  }
  return text;
}

std::string draw_group(const MeshShape& shape, MeshGroup group, const char* name) {
  const auto groups = mesh_groups(shape, group);
  if (groups.front().size() == 1) return "";
  return fmt::format("  {:<16} {:>5} of {:<5} {}\n", name, groups.size(), groups.front().size(),
                     list_groups(groups));
}

std::string draw_stages(const Config& config, const MeshShape& shape) {
  const int64_t layers = config.model.num_hidden_layers;
  const int64_t chunks = chunks_per_stage(config, shape), ranks = shape.stage_ranks();
  const auto split = split_layers(layers, shape.pipeline, chunks);
  std::string text;
  for (int64_t stage = 0; stage < shape.pipeline; ++stage) {
    std::vector<std::string> parts;
    if (stage == 0) parts.push_back("embedding");
    for (const LayerRange& range : split[static_cast<size_t>(stage)])
      parts.push_back(range.end - range.begin == 1
                          ? fmt::format("block {}", range.begin)
                          : fmt::format("blocks {}-{}", range.begin, range.end - 1));
    if (stage == shape.pipeline - 1) {
      parts.push_back("head");
      if (config.model.num_nextn_predict_layers > 0)
        parts.push_back(format_plural(config.model.num_nextn_predict_layers, "prediction module"));
    }
    text += fmt::format("  stage {:<10} ranks {}-{}: {}\n", stage, stage * ranks,
                        (stage + 1) * ranks - 1, fmt::join(parts, ", "));
  }
  return text;
}

}  // namespace

std::string draw_mesh(const Config& config, const MeshShape& shape) {
  std::string text = fmt::format("{}: {}\n", format_plural(shape.ranks(), "rank"), to_text(shape));
  if (shape.pipeline > 1) text += draw_stages(config, shape);
  text += draw_group(shape, MeshGroup::pipeline, "pipeline");
  text += draw_group(shape, MeshGroup::data, "data");
  text += draw_group(shape, MeshGroup::context, "context");
  text += draw_group(shape, MeshGroup::tensor, "tensor");
  text += draw_group(shape, MeshGroup::expert, "experts");
  if (shape.expert > 1) text += draw_group(shape, MeshGroup::expert_data, "same experts");
  const int64_t count = micro_batches_per_step(config, shape);
  text += fmt::format(
      "  {:<16} {}: {}{} of {}\n", "step", format_plural(config.train.global_batch, "sequence"),
      shape.data > 1 ? fmt::format("on each of {} data-parallel ranks ", shape.data) : "",
      count == 1 ? "1 micro-batch" : fmt::format("{} micro-batches", count),
      config.train.micro_batch);
  return text;
}

}  // namespace dstrain
