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

// The first kind with the same stream and the same ranks, which may be the group's own.
MeshGroup sharer_of(const MeshShape& shape, MeshGroup group) {
  const auto first_in = [&](const auto& kinds) {
    if (std::ranges::find(kinds, group) == kinds.end()) return group;
    return *std::ranges::find_if(kinds, [&, ranks = mesh_groups(shape, group)](MeshGroup kind) {
      return mesh_groups(shape, kind) == ranks;
    });
  };
  const MeshGroup of_sums = first_in(kMeshGroupsOfSums);
  return of_sums != group ? of_sums : first_in(kMeshGroupsOfLayers);
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

ProcessMesh::ProcessMesh(const MeshShape& shape, Communicator& world, Backend& backend,
                         bool shared_table)
    : shape_(shape), world_(world) {
  DSTRAIN_CHECK(world.size() == shape.ranks(),
                fmt::format("the layout {} is not one of {} ranks", to_text(shape), world.size()));
  place_ = place_of(shape, world.rank());
  make_groups(backend, shared_table);
}

ProcessMesh::ProcessMesh(const MeshShape& shape, int world_rank, Backend& backend,
                         bool shared_table)
    : shape_(shape),
      place_(place_of(shape, world_rank)),
      planned_world_(
          std::make_unique<PlannedCommunicator>(world_rank, static_cast<int>(shape.ranks()))),
      world_(*planned_world_) {
  make_groups(backend, shared_table);
}

void ProcessMesh::make_groups(Backend& backend, bool shared_table) {
  DSTRAIN_CHECK(shape_.stage_ranks() % shape_.expert == 0, "experts fold over whole runs of ranks");
  for (size_t i = 0; i < kMeshGroups; ++i) {
    const auto group = static_cast<MeshGroup>(i);
    if (group != MeshGroup::embedding || shared_table) {
      make_group(group, backend);
    } else {
      made_[i] = std::make_unique<LocalCommunicator>(backend);
      groups_[i] = made_[i].get();
    }
  }
}

// All ranks split or none does: a split is a call of the whole world.
void ProcessMesh::make_group(MeshGroup group, Backend& backend) {
  const auto index = static_cast<size_t>(group),
             sharer = static_cast<size_t>(sharer_of(shape_, group));
  if (sharer != index) {
    groups_[index] = groups_[sharer];
    return;
  }
  const auto groups = mesh_groups(shape_, group);
  const size_t mine = find_group(groups, world_.rank());
  const std::vector<int>& ranks = groups[mine];
  std::unique_ptr<Communicator>& made = made_[index];
  if (is_planned() && ranks.size() > 1) {
    const auto me = std::lower_bound(ranks.begin(), ranks.end(), world_.rank()) - ranks.begin();
    made =
        std::make_unique<PlannedCommunicator>(static_cast<int>(me), static_cast<int>(ranks.size()));
  } else if (!is_planned() &&
             std::ranges::any_of(groups, [](const auto& g) { return g.size() > 1; })) {
    made = world_.split(static_cast<int>(mine), world_.rank());
  }
  if (ranks.size() == 1) made = std::make_unique<LocalCommunicator>(backend);
  DSTRAIN_CHECK(made->size() == std::ssize(ranks),
                fmt::format("the {} group has the wrong ranks", group_name(group)));
  groups_[index] = made.get();
}

}  // namespace dstrain
