// Everything that one rank of a job trains with, made from the job file and the ranks' communicator: mesh,
// distribution, engine, pipeline. A job of one rank is made of the same parts.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "core/config/config.h"
#include "core/engine/train_engine.h"
#include "parallel/pipeline_runner.h"
#include "parallel/rank_distribution.h"

namespace dstrain {

// What a configuration asks of the engine on this rank of the mesh and this back end.
EngineOptions rank_engine_options(const Config& config, const MeshShape& shape,
                                  const RankPlace& place, const PipelineSchedule& schedule,
                                  bool training, const Backend& backend);

// Puts something between the engine and its distribution, which outlives it; absent, or null, for nothing.
using DistributionWrap = std::function<std::unique_ptr<Distribution>(Distribution& inner)>;

class RankJob {
 public:
  // shape is legal for the config and has world.size() ranks. `node` names this machine. A collective call;
  // world and backend outlive the job. Plans memory, allocates nothing large but what measuring for
  // compression.method auto takes (parallel/sum_timing.h), which it gives back. `earlier`: of the
  // checkpoint that the job goes on from.
  RankJob(const Config& config, const MeshShape& shape, Communicator& world, Backend& backend,
          const std::string& node, bool training, const DistributionWrap& wrap = {},
          const EarlierCompression& earlier = {});
  // The plan of one rank of a job whose other ranks do not exist, as if all were on one machine: its engine
  // tells its memory, and must not be allocated.
  RankJob(const Config& config, const MeshShape& shape, int world_rank, Backend& backend, bool training);

  ProcessMesh& mesh() { return mesh_; }
  RankDistribution& distribution() { return distribution_; }
  TrainEngine& engine() { return *engine_; }
  PipelineRunner& runner() { return *runner_; }
  // begin_step() before engine().begin_step(), end_step() after its finish_step(), take() after its
  // take_result().
  ExposedTime& exposed() { return distribution_.exposed(); }

 private:
  void make_engine(const Config& config, Backend& backend, bool training);

  ProcessMesh mesh_;
  RankDistribution distribution_;
  std::unique_ptr<Distribution> wrapped_;
  std::unique_ptr<TrainEngine> engine_;
  std::unique_ptr<PipelineRunner> runner_;
};

}  // namespace dstrain
