// The mesh of a job: the place of every rank on the axes, which ranks talk to each other for what,
// and this rank's communicators for it.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "core/config/layout.h"
#include "core/dist/communicator.h"
#include "core/dist/place.h"

namespace dstrain {

// One kind of group: every rank is in one group of each kind (but for `embedding`), and the ranks
// of a group are in ascending order.
enum class MeshGroup {
  pipeline,        // same place in all stages: what flows between stages
  stage,           // all ranks of a stage: gradients of replicated parameters
  data,            // differ in data alone
  context,         // differ in context alone: latents, or keys and values, of the same sequences
  tensor,          // differ in tensor alone: parts of the same products
  data_context,    // same tensor part: gradients of parameters that tensor parallelism cuts
  tensor_context,  // same sequences: sums over their tokens
  expert,          // together hold all experts: tokens travel here
  expert_data,     // hold the same experts: their gradients
  embedding,  // same place in the first and the last stage: a table that both have; other stages
              // stand alone
};
inline constexpr int kMeshGroups = 10;
const char* group_name(MeshGroup group);

RankPlace place_of(const MeshShape& shape, int world_rank);
// The number of a rank's group among those of its kind, in no particular order: ranks with equal
// numbers are together.
int group_of(const MeshShape& shape, MeshGroup group, int world_rank);
// All groups of a kind as lists of world ranks, in the order of their first ranks.
std::vector<std::vector<int>> mesh_groups(const MeshShape& shape, MeshGroup group);

// A few lines for people: the axes, which ranks talk, and what blocks and experts each stage holds.
std::string draw_mesh(const Config& config, const MeshShape& shape);

// Kinds whose calls all run on the same stream, one after another. Other kinds run beside others.
inline constexpr std::array kMeshGroupsOfSums = {MeshGroup::stage, MeshGroup::data,
                                                 MeshGroup::data_context, MeshGroup::expert_data};
inline constexpr std::array kMeshGroupsOfLayers = {MeshGroup::tensor, MeshGroup::tensor_context};

// This rank's place and communicators. Making one is a collective call of all ranks of `world`,
// which must be shape.ranks() ranks and outlive the mesh, as must the backend. Groups of one rank
// are LocalCommunicators; world rank order is the order in each group. Kinds that run on the same
// stream and join the same ranks everywhere share a communicator: on GPUs each costs time at the
// start and memory.
class ProcessMesh {
 public:
  // shared_table: whether the model has one (reads_table_twice()). Without, each rank is alone in
  // its `embedding` group.
  ProcessMesh(const MeshShape& shape, Communicator& world, Backend& backend,
              bool shared_table = true);
  // The place of one rank alone, for plans: its groups have the right ranks and sizes, and refuse
  // to move data (parallel/planned_communicator.h).
  ProcessMesh(const MeshShape& shape, int world_rank, Backend& backend, bool shared_table = true);

  const MeshShape& shape() const { return shape_; }
  bool is_planned() const { return planned_world_ != nullptr; }
  const RankPlace& place() const { return place_; }
  Communicator& world() { return world_; }
  Communicator& group(MeshGroup group) { return *groups_[static_cast<size_t>(group)]; }

 private:
  void make_groups(Backend& backend, bool shared_table);
  void make_group(MeshGroup group, Backend& backend);

  MeshShape shape_;
  RankPlace place_;
  std::unique_ptr<Communicator> planned_world_;
  Communicator& world_;
  // By MeshGroup: null where an earlier kind has the communicator.
  std::array<std::unique_ptr<Communicator>, kMeshGroups> made_;
  std::array<Communicator*, kMeshGroups> groups_ = {};
};

}  // namespace dstrain
