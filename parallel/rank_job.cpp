#include "parallel/rank_job.h"

#include <algorithm>

#include "core/engine/precision.h"
#include "parallel/layer_split.h"

namespace dstrain {
namespace {

PipelineSchedule schedule_of(const Config& config, const MeshShape& shape) {
  const int micro_batches = static_cast<int>(micro_batches_per_step(config, shape));
  if (shape.pipeline == 1) return make_one_f_one_b(1, micro_batches);
  return make_pipeline_schedule(config.parallel.schedule, shape.pipeline,
                                static_cast<int>(chunks_per_stage(config, shape)), micro_batches);
}

}  // namespace

EngineOptions rank_engine_options(const Config& config, const MeshShape& shape,
                                  const RankPlace& place, const PipelineSchedule& schedule,
                                  bool training, const Backend& backend) {
  EngineOptions options;
  options.micro_batch = config.train.micro_batch;
  options.global_batch = config.train.global_batch;
  options.seq_len = config.data.seq_len;
  options.recompute = config.train.recompute;
  options.optimizer = config.optimizer;
  options.training = training;
  options.chunks.clear();
  const auto layers = split_layers(config.model.num_hidden_layers, shape.pipeline, schedule.virtual_stages);
  for (const LayerRange& range : layers[static_cast<size_t>(place.pipeline.rank)])
    options.chunks.push_back({range.begin, range.end, 1});
  fit_engine(schedule, place.pipeline.rank, options);
  // So that the host need not wait for a micro-batch to be computed before it loads the next.
  if (!backend.is_cpu()) options.loaded_batches = std::max(2, options.loaded_batches);
  set_precision(config.precision, backend, options);
  return options;
}

RankJob::RankJob(const Config& config, const MeshShape& shape, Communicator& world, Backend& backend,
                 const std::string& node, bool training, const DistributionWrap& wrap,
                 const EarlierCompression& earlier)
    : mesh_(shape, world, backend, reads_table_twice(config.model)), distribution_(config, mesh_, backend, node, earlier) {
  if (wrap) wrapped_ = wrap(distribution_);
  make_engine(config, backend, training);
}

RankJob::RankJob(const Config& config, const MeshShape& shape, int world_rank, Backend& backend, bool training)
    : mesh_(shape, world_rank, backend, reads_table_twice(config.model)), distribution_(config, mesh_, backend, "the machine of a plan") {
  make_engine(config, backend, training);
}

void RankJob::make_engine(const Config& config, Backend& backend, bool training) {
  const PipelineSchedule schedule = schedule_of(config, mesh_.shape());
  engine_ = std::make_unique<TrainEngine>(
      backend, config.model,
      rank_engine_options(config, mesh_.shape(), mesh_.place(), schedule, training, backend),
      wrapped_ ? wrapped_.get() : &distribution_);
  runner_ = std::make_unique<PipelineRunner>(*engine_, schedule, mesh_.group(MeshGroup::pipeline),
                                             exposed());
}

}  // namespace dstrain
