#include "parallel/residual_state.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <optional>
#include <string>
#include <string_view>

namespace dstrain {
namespace {

constexpr std::string_view kPrefix = "residual.", kTiedPrefix = "tied_residual.",
                           kSumKind = "residual.sum";

bool is_copy(const Parameter& parameter) {
  return parameter.spec.tie == Tie::copy;
}

std::string kind_of_rank(const Parameter& parameter, int rank, int ranks) {
  return fmt::format("{}{}of{}", is_copy(parameter) ? kTiedPrefix : kPrefix, rank, ranks);
}

// What a checkpoint holds for the residuals of a parameter. Kinds are sorted, so that sums over
// them always run in the same order.
struct SavedResiduals {
  std::vector<std::string> of_ranks;
  std::vector<std::string> of_copies;  // of the other stage's copy, where this layout has none
  bool of_sum = false;

  SavedResiduals(const Parameter& parameter, std::vector<std::string> kinds) {
    const bool copy = is_copy(parameter);
    std::sort(kinds.begin(), kinds.end());
    for (std::string& kind : kinds) {
      if (kind == kSumKind)
        of_sum = true;
      else if (kind.starts_with(copy ? kTiedPrefix : kPrefix))
        of_ranks.push_back(std::move(kind));
      else if (kind.starts_with(kTiedPrefix) && parameter.spec.tie == Tie::none)
        of_copies.push_back(std::move(kind));
    }
  }
  // Those of exactly so many ranks.
  bool fits(const Parameter& parameter, int ranks) const {
    if (of_ranks.size() != static_cast<size_t>(ranks)) return false;
    for (int r = 0; r < ranks; ++r)
      if (!std::binary_search(of_ranks.begin(), of_ranks.end(), kind_of_rank(parameter, r, ranks)))
        return false;
    return true;
  }
};

// Calls body(parameter, begin, end, data) for each part of a parameter that lies in [begin, begin +
// data.numel()) of the flat range and before `limit`; begin and end count elements of the
// parameter.
template <class Body>
void for_each_part(const std::vector<const Parameter*>& by_offset, int64_t begin, int64_t limit,
                   const Tensor& data, const Body& body) {
  const int64_t end = std::min(begin + data.numel(), limit);
  auto at = std::partition_point(by_offset.begin(), by_offset.end(), [&](const Parameter* p) {
    return p->offset + p->numel() <= begin;
  });
  for (; at != by_offset.end() && (*at)->offset < end; ++at) {
    const Parameter& p = **at;
    const int64_t from = std::max(begin, p.offset), to = std::min(end, p.offset + p.numel());
    if (from < to) body(p, from - p.offset, to - p.offset, data.rows(from - begin, to - begin));
  }
}

std::vector<const Parameter*> trainable_by_offset(const ParameterSet& parameters) {
  std::vector<const Parameter*> sorted;
  for (const Parameter& p : parameters.all())
    if (p.spec.trainable) sorted.push_back(&p);
  std::sort(sorted.begin(), sorted.end(),
            [](const Parameter* a, const Parameter* b) { return a->offset < b->offset; });
  return sorted;
}

// The same for a piece of a range, or for all of them.
template <class Body>
void for_each_part_of_piece(const std::vector<const Parameter*>& by_offset,
                            const ResidualRange& range, int piece, const Body& body) {
  const PieceLayout& layout = range.layout;
  for_each_part(by_offset, layout.begin + piece * layout.stride, layout.end,
                range.residual_PN.rows(piece, piece + 1).view({layout.shard}), body);
}
template <class Body>
void for_each_part_of_all(const std::vector<const Parameter*>& by_offset,
                          const ResidualRange& range, int ranks, const Body& body) {
  if (range.layout.stride == range.layout.shard) {  // pieces are neighbours in the flat range, too
    for_each_part(by_offset, range.layout.begin, range.layout.end,
                  range.residual_PN.view({range.residual_PN.numel()}), body);
    return;
  }
  for (int piece = 0; piece < ranks; ++piece) for_each_part_of_piece(by_offset, range, piece, body);
}
template <class Body>
void for_each_part_of_sum(const std::vector<const Parameter*>& by_offset,
                          const ResidualRange& range, int rank, const Body& body) {
  const PieceLayout& layout = range.layout;
  if (range.sum_residual_1N.defined())
    for_each_part(by_offset, layout.begin + rank * layout.stride, layout.end,
                  range.sum_residual_1N.view({layout.shard}), body);
}

}  // namespace

bool is_residual(const std::string& kind) {
  return kind.starts_with(kPrefix) || kind.starts_with(kTiedPrefix);
}

std::vector<StateSlice> saved_residuals(const ParameterSet& parameters,
                                        const std::vector<ResidualRange>& ranges, int rank,
                                        int ranks) {
  const std::vector<const Parameter*> by_offset = trainable_by_offset(parameters);
  std::vector<StateSlice> slices;
  for (const ResidualRange& range : ranges) {
    for_each_part_of_all(by_offset, range, ranks,
                         [&](const Parameter& p, int64_t begin, int64_t end, const Tensor& data) {
                           slices.push_back({kind_of_rank(p, rank, ranks), &p, begin, end, data});
                         });
    for_each_part_of_sum(by_offset, range, rank,
                         [&](const Parameter& p, int64_t begin, int64_t end, const Tensor& data) {
                           if (!is_copy(p))
                             slices.push_back({std::string(kSumKind), &p, begin, end, data});
                         });
  }
  return slices;
}

std::vector<StateSlice> loaded_residuals(const ParameterSet& parameters,
                                         const std::vector<ResidualRange>& ranges, int rank,
                                         int ranks, const SavedKinds& kinds) {
  const std::vector<const Parameter*> by_offset = trainable_by_offset(parameters);
  std::vector<StateSlice> slices;
  for (const ResidualRange& range : ranges) {
    const bool keeps_sums = range.sum_residual_1N.defined();
    for_each_part_of_all(by_offset, range, ranks,
                         [&](const Parameter& p, int64_t begin, int64_t end, const Tensor& data) {
                           if (SavedResiduals(p, kinds(p)).fits(p, ranks))
                             slices.push_back({kind_of_rank(p, rank, ranks), &p, begin, end, data});
                         });
    for_each_part_of_piece(
        by_offset, range, rank,
        [&](const Parameter& p, int64_t begin, int64_t end, const Tensor& data) {
          SavedResiduals saved(p, kinds(p));
          std::vector<std::string> added = std::move(saved.of_copies);
          if (!saved.fits(p, ranks))
            added.insert(added.end(), saved.of_ranks.begin(), saved.of_ranks.end());
          if (saved.of_sum && !keeps_sums && !is_copy(p)) added.emplace_back(kSumKind);
          for (std::string& kind : added)
            slices.push_back({std::move(kind), &p, begin, end, data, /*add=*/true});
        });
    for_each_part_of_sum(by_offset, range, rank,
                         [&](const Parameter& p, int64_t begin, int64_t end, const Tensor& data) {
                           if (SavedResiduals(p, kinds(p)).of_sum)
                             slices.push_back({std::string(kSumKind), &p, begin, end, data});
                         });
  }
  return slices;
}

std::vector<StateSlice> saved_leftovers(const ParameterSet& parameters, const PieceLayout& layout,
                                        const Tensor& leftover_N, int rank) {
  std::vector<StateSlice> slices;
  for_each_part(trainable_by_offset(parameters), layout.begin + rank * layout.stride, layout.end,
                leftover_N,
                [&](const Parameter& p, int64_t begin, int64_t end, const Tensor& data) {
                  if (!is_copy(p)) slices.push_back({std::string(kSumKind), &p, begin, end, data});
                });
  return slices;
}

std::vector<StateSlice> loaded_leftovers(const ParameterSet& parameters, const PieceLayout& layout,
                                         const Tensor& leftover_N, int rank,
                                         const SavedKinds& kinds) {
  std::vector<StateSlice> slices;
  for_each_part(trainable_by_offset(parameters), layout.begin + rank * layout.stride, layout.end,
                leftover_N,
                [&](const Parameter& p, int64_t begin, int64_t end, const Tensor& data) {
                  SavedResiduals saved(p, kinds(p));
                  std::vector<std::string> added = std::move(saved.of_copies);
                  added.insert(added.end(), saved.of_ranks.begin(), saved.of_ranks.end());
                  if (saved.of_sum && !is_copy(p)) added.emplace_back(kSumKind);
                  for (std::string& kind : added)
                    slices.push_back({std::move(kind), &p, begin, end, data, /*add=*/true});
                });
  return slices;
}

}  // namespace dstrain
