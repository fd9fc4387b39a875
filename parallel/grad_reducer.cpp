#include "parallel/grad_reducer.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/base/format_units.h"
#include "parallel/compression.h"
#include "parallel/dense_reducer.h"

namespace dstrain {
namespace {

std::string describe_phase(const char* name, const PhaseTraffic& phase) {
  const auto share = [](int64_t sent, int64_t baseline) {
    return fmt::format("{:.1f}% of {} in fp32 at once",
                       100.0 * static_cast<double>(sent) / static_cast<double>(baseline),
                       format_bytes(baseline));
  };
  std::string text = fmt::format("{} {} sent, {}", name, format_bytes(phase.sent),
                                 share(phase.sent, phase.baseline));
  if (phase.baseline_between_nodes > 0)
    text += fmt::format(" (between nodes {}, {})", format_bytes(phase.sent_between_nodes),
                        share(phase.sent_between_nodes, phase.baseline_between_nodes));
  if (phase.seconds > 0) text += fmt::format(" in {:.3g} s", phase.seconds);
  return text;
}

// The number of each rank's node, by first appearance.
std::vector<int> number_nodes(const std::vector<std::string>& names) {
  std::vector<std::string> nodes;
  std::vector<int> numbers;
  for (const std::string& name : names) {
    const auto at = std::find(nodes.begin(), nodes.end(), name);
    numbers.push_back(static_cast<int>(at - nodes.begin()));
    if (at == nodes.end()) nodes.push_back(name);
  }
  return numbers;
}

std::vector<PieceLayout> pieces_of_all(const std::vector<GradRange>& ranges) {
  std::vector<PieceLayout> pieces;
  for (const GradRange& range : ranges)
    pieces.push_back({range.begin, range.end, range.shard, range.shard});
  return pieces;
}

// Between nodes a rank exchanges the pieces of the ranks with its place, one per node.
std::vector<PieceLayout> pieces_between_nodes(const std::vector<GradRange>& ranges,
                                              const Communicator& intra) {
  std::vector<PieceLayout> pieces;
  for (const GradRange& range : ranges)
    pieces.push_back({range.begin + intra.rank() * range.shard, range.end, range.shard,
                      intra.size() * range.shard});
  return pieces;
}

}  // namespace

PhaseTraffic& PhaseTraffic::operator+=(const PhaseTraffic& other) {
  sent += other.sent;
  baseline += other.baseline;
  sent_between_nodes += other.sent_between_nodes;
  baseline_between_nodes += other.baseline_between_nodes;
  seconds += other.seconds;
  return *this;
}

GradTraffic& GradTraffic::operator+=(const GradTraffic& other) {
  reduce += other.reduce;
  gather += other.gather;
  return *this;
}

std::string describe(const GradTraffic& traffic) {
  std::string text;
  if (traffic.reduce.baseline > 0) text = describe_phase("reduce-scatter", traffic.reduce);
  if (traffic.gather.baseline > 0)
    text += (text.empty() ? "" : "; ") + describe_phase("all-gather", traffic.gather);
  return text.empty() ? "nothing sent" : text;
}

NodeSplit split_by_node(Communicator& all, const std::string& node, bool two_levels) {
  const std::vector<int> node_of = number_nodes(all.all_gather_text(node));
  const int ranks = all.size(), me = all.rank();
  const int mine = node_of[static_cast<size_t>(me)];
  NodeSplit split;
  split.ranks.all = &all;
  split.ranks.nodes = 1 + *std::max_element(node_of.begin(), node_of.end());
  split.ranks.elsewhere =
      ranks - static_cast<int>(std::count(node_of.begin(), node_of.end(), mine));

  const int per_node = ranks / split.ranks.nodes;
  bool even = two_levels && split.ranks.nodes > 1 && per_node > 1;
  for (int r = 0; r < ranks; ++r) even = even && node_of[static_cast<size_t>(r)] == r / per_node;
  if (!even || ranks % split.ranks.nodes != 0) return split;
  split.intra = all.split(mine, me);
  split.inter = all.split(me % per_node, me);
  split.ranks.intra = split.intra.get();
  split.ranks.inter = split.inter.get();
  return split;
}

bool may_sum_in_two_levels(const CompressionConfig& compression, bool hierarchical) {
  const bool may_be_whole = compression.method == CompressionMethod::none ||
                            compression.method == CompressionMethod::automatic;
  const bool may_be_compressed = compression.method != CompressionMethod::none;
  return (may_be_whole && hierarchical) ||
         (may_be_compressed && compression.scope == CompressionScope::inter_node);
}

bool can_compress(const CompressionConfig& compression, const ReduceRanks& ranks) {
  return ranks.all->size() > 1 && (compression.scope == CompressionScope::all || ranks.nodes > 1);
}

std::unique_ptr<GradReducer> make_grad_reducer(const GradReducerOptions& options,
                                               const ReduceRanks& ranks,
                                               const ParameterSet& parameters,
                                               std::vector<GradRange> ranges) {
  const CompressionConfig& compression = options.compression;
  const bool between_nodes = compression.scope == CompressionScope::inter_node;
  const bool compresses =
      compression.method != CompressionMethod::none && can_compress(compression, ranks);
  const bool rounds = options.rounds && ranks.all->size() > 1;
  DSTRAIN_CHECK(options.dtype == DType::f32 || !(compresses || rounds),
                std::string(compresses ? "compression" : "rounding to bf16") +
                    " takes f32 gradients, not " + dtype_name(options.dtype));
  DSTRAIN_CHECK(!(compresses && rounds), "gradients are compressed or rounded, not both");
  if (compresses && between_nodes && !ranks.intra && ranks.nodes != ranks.all->size())
    throw ConfigError(fmt::format(
        "compression.scope: inter_node needs the same number of consecutive ranks on every node, "
        "but {} ranks that sum gradients lie unevenly on {} nodes; scope: all works",
        ranks.all->size(), ranks.nodes));
  const auto make = [&](Communicator& comm, std::vector<PieceLayout> pieces,
                        int elsewhere) -> std::unique_ptr<GradReducer> {
    if (!compresses) return std::make_unique<DenseReducer>(comm, elsewhere);
    return std::make_unique<CompressedReducer>(compression, comm, elsewhere, parameters,
                                               std::move(pieces), options.gathers);
  };
  const auto make_levels = [&]() -> std::unique_ptr<GradReducer> {
    const bool two_levels = compresses ? between_nodes : options.hierarchical;
    if (!ranks.intra || !two_levels)
      return make(*ranks.all, pieces_of_all(ranges), ranks.elsewhere);
    return std::make_unique<HierarchicalReducer>(
        *ranks.intra, ranks.inter->size(), rounds ? DType::bf16 : options.dtype, ranges,
        make(*ranks.inter, pieces_between_nodes(ranges, *ranks.intra), ranks.inter->size() - 1));
  };
  if (!rounds) return make_levels();
  return std::make_unique<Bf16Reducer>(make_levels(), *ranks.all, ranges);
}

}  // namespace dstrain
