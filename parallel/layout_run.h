// A short training run of a job at any layout, on ranks that are threads of this process or
// processes of their own, and the comparison of two such runs: what `verify` and the layout tests
// are made of. Batches are random tokens in packed documents, the same for every layout.
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
#include "parallel/gathered_state.h"
#include "parallel/grad_reducer.h"
#include "parallel/random_sequences.h"
#include "parallel/rank_job.h"
#include "parallel/routing_record.h"

namespace dstrain {

struct LayoutRun {
  MeshShape shape;
  std::vector<StepResult> steps;
  GatheredState first_moments;  // after step 1, of parameters
  GatheredState state;          // after the last step
  bool replayed = false;        // a recorded routing
  RoutingFlips flips;           // over all ranks, where a routing was replayed
  GradTraffic traffic;          // of rank 0, of this rank where ranks are processes
  // What ranks do not agree on: a parameter of which they hold copies, or the sums of a step. "" if
  // they do.
  std::string disagreement;
  double seconds = 0;
};

// Faults, for tests that a comparison finds them.
struct PlantedFault {
  DistributionWrap wrap;
  // May change what a rank loads as its micro-batch m of a step.
  std::function<void(const RankPlace& place, int64_t m, SequenceBatch& batch)> edit_batch;
};

struct LayoutRunOptions {
  int64_t steps = 20;
  std::shared_ptr<RoutingRecord> record;  // filled, or replayed; all ranks of the process share it
  bool replay = false;
  int threads = 1;  // of each rank's back end
  int nodes = 1;    // machines that the ranks say they are on, equally many on each
  // Of a rank; empty for a CPU's.
  std::function<std::unique_ptr<Backend>(int rank)> make_backend;
  // Of ranks whose memory theirs does not reach; may give none.
  std::function<std::unique_ptr<Communicator>(Communicator& ranks, Backend& backend)>
      make_device_ranks;
  PlantedFault fault;
  // Called on each rank after the last step; rank threads one after another.
  std::function<void(TrainEngine&)> at_end;
  // Fills each rank's state in place of initial values (after them); ranks at once.
  std::function<void(TrainEngine&)> at_start;
  int64_t first_step = 0;  // steps that the run has done before, for resumed runs
  std::chrono::milliseconds timeout = std::chrono::minutes(2);  // of rank threads
};

// The job's learning rate stays constant. Throws what a rank throws.
LayoutRun run_layout(const Config& config, const MeshShape& shape, const LayoutRunOptions& options);
// The same with this process as one of world.size() = shape.ranks() ranks; a collective call. All
// ranks get the whole result.
LayoutRun run_layout_on(Communicator& world, const Config& config, const MeshShape& shape,
                        const LayoutRunOptions& options);

// --- layout_compare.cpp

// One line of a comparison.
struct LayoutCheck {
  std::string name;
  double worst = 0, limit = 0;
  std::string where;
  bool ok() const { return worst <= limit; }  // false for NaN
};
struct LayoutTolerances {
  double gradient = 1e-5;        // relative L2 of each tensor, of step 1, before clipping
  double gradient_floor = 1e-6;  // of the global norm: tensors below it are measured against that
  double loss = 2e-6;            // relative, every step
  // RMS of each tensor after the last step, of the learning rate times steps: an element whose
  // gradient is rounding alone goes its own way.
  double parameter = 1e-2;
  double margin = 1e-5;  // of scores, where the routing would have been another
};
std::vector<LayoutCheck> compare_layouts(const Config& config, const LayoutRun& reference,
                                         const LayoutRun& run,
                                         const LayoutTolerances& tolerances = {});
// Gradients of step 1 before clipping, by parameter.
std::map<std::string, std::vector<double>> gradients_of(const Config& config, const LayoutRun& run);
// "" if all steps and the final state have the same bits, else the first difference.
std::string bit_difference(const LayoutRun& a, const LayoutRun& b);

}  // namespace dstrain
