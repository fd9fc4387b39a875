// A short training run of a job at any layout, on ranks that are threads of this process, and the comparison of
// two such runs: what `verify` and the layout tests are made of. Batches are random tokens in packed
// documents, the same for every layout.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/config/config.h"
#include "core/config/layout.h"
#include "core/engine/train_engine.h"
#include "parallel/grad_reducer.h"
#include "parallel/routing_record.h"

namespace dstrain {

// A tensor of the whole model, and how many ranks brought each of its elements.
struct GatheredTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
  std::vector<uint8_t> brought;
};
using GatheredState = std::map<std::string, GatheredTensor>;  // by kind and parameter: "param.model.norm.weight"

struct LayoutRun {
  MeshShape shape;
  std::vector<StepResult> steps;
  GatheredState first_moments;  // after step 1, of parameters
  GatheredState state;          // after the last step
  RoutingFlips flips;           // over all ranks, where a routing was replayed
  GradTraffic traffic;          // of rank 0
  double seconds = 0;
};

struct LayoutRunOptions {
  int64_t steps = 20;
  std::shared_ptr<RoutingRecord> record;  // filled, or replayed
  bool replay = false;
  int threads = 1;      // of each rank's back end
  // Makes faults, for tests of the comparison: called with each rank's engine before its first step.
  std::function<void(TrainEngine&)> tamper;
  // Called on each rank after the last step, ranks one after another.
  std::function<void(TrainEngine&)> at_end;
  // Fills each rank's state in place of initial values (after them); ranks at once.
  std::function<void(TrainEngine&)> at_start;
  int64_t first_step = 0;  // steps that the run has done before, for resumed runs
  std::chrono::milliseconds timeout = std::chrono::minutes(2);
};


// The job's learning rate stays constant. Throws what a rank throws.
LayoutRun run_layout(const Config& config, const MeshShape& shape, const LayoutRunOptions& options);

// One line of a comparison.
struct LayoutCheck {
  std::string name;
  double worst = 0, limit = 0;
  std::string where;
  bool ok() const { return worst <= limit; }  // false for NaN
};
struct LayoutTolerances {
  double gradient = 1e-5;  // relative L2 of each tensor, of step 1, before clipping
  double gradient_floor = 1e-6;  // of the global norm: tensors below it are measured against that
  double loss = 2e-6;      // relative, every step
  double margin = 1e-5;    // of scores, where the routing would have been another
};
std::vector<LayoutCheck> compare_layouts(const Config& config, const LayoutRun& reference,
                                         const LayoutRun& run, const LayoutTolerances& tolerances = {});
// "" if all steps and the final state have the same bits, else the first difference.
std::string bit_difference(const LayoutRun& a, const LayoutRun& b);
// Adds slices of one rank. Not thread-safe.
void gather_state(TrainEngine& engine, const std::vector<StateSlice>& slices, GatheredState& state);

}  // namespace dstrain
