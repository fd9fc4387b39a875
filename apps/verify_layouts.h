// The layouts that a job could use against one rank: the job made small (apps/shrink_config.h),
// each layout run on rank threads of this process, and compared by the limits of
// parallel/layout_run.h.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/config/config.h"
#include "parallel/layout_run.h"

namespace dstrain {

struct VerifyLayout {
  std::string name;  // "pipeline 2 x data 2, expert 2, ZeRO-1"
  MeshShape shape;
  int64_t zero = 1;
};

struct VerifyPlan {
  Config config;  // small; its layout is the job's own, made small
  int64_t ranks = 4;
  std::vector<VerifyLayout> layouts;
  int64_t left_out = 0;            // legal ones of up to so many ranks that are not among them
  std::vector<std::string> notes;  // what differs from the job besides sizes, a sentence each
  // What changes gradients on their way; with method none and fp32 nothing does.
  CompressionConfig compression;
  ReduceType reduce = ReduceType::fp32;
};

// ranks: 0 chooses 4, or 8 where the job's axes need them. The own layout in all ZeRO stages, each
// axis alone and all pairs of axes, on as few ranks as that takes; `all` adds every other legal
// layout.
VerifyPlan plan_verification(const Config& config, int64_t ranks, bool all);

struct VerifyRow {
  VerifyLayout layout;
  std::vector<LayoutCheck> checks;  // none where the run failed
  std::string failure;              // why it did
  std::vector<std::string> diagnosis;
  double seconds = 0;
  bool ok() const;
};

struct VerifyRunOptions {
  int64_t steps = 20;
  LayoutTolerances tolerances = {};
  PlantedFault fault = {};  // in all runs but that of the one rank
};

// Calls `done` after each layout, in the order of the plan; after them once for what changes
// gradients on their way: two runs of the own layout have to agree to the bit. True if all are ok.
bool run_verification(const VerifyPlan& plan, const VerifyRunOptions& options,
                      const std::function<void(const VerifyRow&)>& done);

}  // namespace dstrain
