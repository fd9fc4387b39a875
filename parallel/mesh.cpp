#include "parallel/mesh.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "core/base/error.h"
#include "parallel/planned_communicator.h"

namespace dstrain {
namespace {

// The place in `groups` of the one that the rank is in.
size_t find_group(const std::vector<std::vector<int>>& groups, int world_rank) {
  const auto mine = std::find_if(groups.begin(), groups.end(), [&](const auto& ranks) {
    return std::binary_search(ranks.begin(), ranks.end(), world_rank);
  });
  return static_cast<size_t>(mine - groups.begin());
}

}  // namespace

const char* group_name(MeshGroup group) {
  static constexpr std::array<const char*, kMeshGroups> kNames = {
      "pipeline",     "stage",          "data",   "context",     "tensor",
      "data_context", "tensor_context", "expert", "expert_data", "embedding"};
  return kNames[static_cast<size_t>(group)];
}

RankPlace place_of(const MeshShape& shape, int world_rank) {
  DSTRAIN_CHECK(world_rank >= 0 && world_rank < shape.ranks(), "a rank outside of the mesh");
  const int stage_ranks = static_cast<int>(shape.stage_ranks());
  const int in_stage = world_rank % stage_ranks;
  RankPlace place;
  place.pipeline = {world_rank / stage_ranks, shape.pipeline};
  place.data = {in_stage / (shape.context * shape.tensor), shape.data};
  place.context = {in_stage / shape.tensor % shape.context, shape.context};
  place.tensor = {in_stage % shape.tensor, shape.tensor};
  place.expert = {in_stage % shape.expert, shape.expert};
  place.expert_data = {in_stage / shape.expert, stage_ranks / shape.expert};
  return place;
}

int group_of(const MeshShape& shape, MeshGroup group, int world_rank) {
  const RankPlace p = place_of(shape, world_rank);
  const int stage = p.pipeline.rank, in_stage = p.in_stage().rank;
  switch (group) {
    case MeshGroup::pipeline:
      return in_stage;
    case MeshGroup::stage:
      return stage;
    case MeshGroup::data:
      return (stage * shape.context + p.context.rank) * shape.tensor + p.tensor.rank;
    case MeshGroup::context:
      return (stage * shape.data + p.data.rank) * shape.tensor + p.tensor.rank;
    case MeshGroup::tensor:
      return (stage * shape.data + p.data.rank) * shape.context + p.context.rank;
    case MeshGroup::data_context:
      return stage * shape.tensor + p.tensor.rank;
    case MeshGroup::tensor_context:
      return stage * shape.data + p.data.rank;
    case MeshGroup::expert:
      return stage * p.expert_data.size + p.expert_data.rank;
    case MeshGroup::expert_data:
      return stage * shape.expert + p.expert.rank;
    case MeshGroup::embedding:
      return stage == 0 || stage == shape.pipeline - 1 ? in_stage : world_rank;
  }
  check_failed("group", __FILE__, __LINE__, "no such kind of group");
}

std::vector<std::vector<int>> mesh_groups(const MeshShape& shape, MeshGroup group) {
  std::vector<std::vector<int>> groups;
  std::map<int, size_t> index;  // of a group, by its number
  for (int rank = 0; rank < shape.ranks(); ++rank) {
    const auto [entry, is_new] = index.try_emplace(group_of(shape, group, rank), groups.size());
    if (is_new) groups.emplace_back();
    groups[entry->second].push_back(rank);
  }
  return groups;
}

ProcessMesh::ProcessMesh(const MeshShape& shape, Communicator& world, Backend& backend)
    : shape_(shape), world_(world) {
  DSTRAIN_CHECK(world.size() == shape.ranks(),
                fmt::format("the layout {} is not one of {} ranks", to_text(shape), world.size()));
  DSTRAIN_CHECK(shape.stage_ranks() % shape.expert == 0, "experts fold over whole runs of ranks");
  place_ = place_of(shape, world.rank());
  for (int i = 0; i < kMeshGroups; ++i) {
    const auto group = static_cast<MeshGroup>(i);
    const auto groups = mesh_groups(shape, group);
    const size_t mine = find_group(groups, world.rank());
    // All ranks split or none does: a split is a call of the whole world.
    const bool any_shared = std::any_of(groups.begin(), groups.end(),
                                        [](const auto& ranks) { return ranks.size() > 1; });
    if (any_shared) groups_[i] = world.split(static_cast<int>(mine), world.rank());
    if (groups[mine].size() == 1) groups_[i] = std::make_unique<LocalCommunicator>(backend);
    DSTRAIN_CHECK(groups_[i]->size() == std::ssize(groups[mine]),
                  fmt::format("the {} group has the wrong ranks", group_name(group)));
  }
  group(MeshGroup::pipeline).prepare(Connections::messages);
  group(MeshGroup::expert).prepare(Connections::exchanges);
}

ProcessMesh::ProcessMesh(const MeshShape& shape, int world_rank, Backend& backend)
    : shape_(shape),
      place_(place_of(shape, world_rank)),
      planned_world_(
          std::make_unique<PlannedCommunicator>(world_rank, static_cast<int>(shape.ranks()))),
      world_(*planned_world_) {
  DSTRAIN_CHECK(shape.stage_ranks() % shape.expert == 0, "experts fold over whole runs of ranks");
  for (int i = 0; i < kMeshGroups; ++i) {
    const auto groups = mesh_groups(shape, static_cast<MeshGroup>(i));
    const std::vector<int>& ranks = groups[find_group(groups, world_rank)];
    if (ranks.size() == 1) {
      groups_[i] = std::make_unique<LocalCommunicator>(backend);
      continue;
    }
    const auto me = std::lower_bound(ranks.begin(), ranks.end(), world_rank) - ranks.begin();
    groups_[i] = std::make_unique<PlannedCommunicator>(static_cast<int>(me), std::ssize(ranks));
  }
}

}  // namespace dstrain
