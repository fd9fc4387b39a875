// Layouts of a job over ranks: how many ranks each axis has, which layouts are legal for a model
// and a batch, and what to write instead of one that is not. Pure functions; any thread may call
// them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/config/config.h"

namespace dstrain {

// Ranks of each axis. pipeline x data x context x tensor are all ranks. Experts fold differently:
// within a pipeline stage they are spread over `expert` ranks, whatever axes these belong to, and
// stage_ranks() / expert ranks hold the same ones.
struct MeshShape {
  int pipeline = 1, data = 1, context = 1, tensor = 1, expert = 1;

  int64_t stage_ranks() const { return int64_t{data} * context * tensor; }
  int64_t ranks() const { return pipeline * stage_ranks(); }
  int64_t expert_data() const { return stage_ranks() / expert; }
  bool operator==(const MeshShape&) const = default;
};

// "pipeline 2 x data 8 x tensor 4, expert 8"; axes of one rank are left out, "data 1" if all are.
std::string to_text(const MeshShape& shape);

struct LayoutProblem {
  std::string key;      // of the job file: "parallel.tensor"
  std::string message;  // a sentence without a full stop
  std::string hint;     // what would be legal
};

// Every rule that the shape breaks; empty if it is legal. With one pipeline stage,
// parallel.schedule and parallel.virtual_stages do not count.
std::vector<LayoutProblem> check_layout(const Config& config, const MeshShape& shape);
// What is legal but costs something that may not be meant, a sentence each.
std::vector<std::string> layout_notes(const Config& config, const MeshShape& shape);

// The axes under `parallel` over this many ranks; data: auto takes what the others leave. None if
// the product is another number.
std::optional<MeshShape> mesh_over(const ParallelConfig& parallel, int64_t ranks);
// Why mesh_over() found none, with the nearest legal layouts as the hint.
LayoutProblem misfit(const Config& config, int64_t ranks);
// The legal layout of a job of this many ranks; ConfigError with every reason and the nearest legal
// layouts if `parallel` does not describe one.
MeshShape resolve_mesh(const Config& config, int64_t ranks);
// Every legal layout of this many ranks, ascending by (pipeline, data, context, tensor, expert).
// The sizes under `parallel` do not matter, its other keys do.
std::vector<MeshShape> legal_shapes(const Config& config, int64_t ranks);
// The same job with this layout.
Config with_shape(Config config, const MeshShape& shape);

// Ranks that `launch` asks for on all hosts; 0 if that is auto on any of them.
int64_t launch_ranks(const LaunchConfig& launch);
// The smallest layout that `parallel` describes: with data: auto, every legal data is a multiple of
// its.
MeshShape smallest_mesh(const Config& config);
// The layout that a job file describes before any rank has started: the smallest one where
// launch.ranks is auto. None if launch.ranks does not fit.
std::optional<MeshShape> planned_mesh(const Config& config);

// Micro-batches per step and rank, model chunks per pipeline stage.
int64_t micro_batches_per_step(const Config& config, const MeshShape& shape);
int64_t chunks_per_stage(const Config& config, const MeshShape& shape);

}  // namespace dstrain
