// What engines and layers of one rank of a job are given (core/dist/distribution.h), over the
// communicators of its mesh. Axes of one rank get the local versions.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/config/config.h"
#include "core/dist/local.h"
#include "parallel/auto_compression.h"
#include "parallel/context_parallel.h"
#include "parallel/expert_parallel.h"
#include "parallel/exposed_time.h"
#include "parallel/grad_reducer.h"
#include "parallel/mesh.h"
#include "parallel/param_shards.h"
#include "parallel/reduce_times.h"
#include "parallel/tensor_parallel.h"

namespace dstrain {

class RankDistribution : public Distribution {
 public:
  // `node` names the machine of this rank. Making one is a collective call of all ranks; mesh and
  // backend outlive it. `earlier`: of the checkpoint that the job goes on from.
  RankDistribution(const Config& config, ProcessMesh& mesh, Backend& backend,
                   const std::string& node, const EarlierCompression& earlier = {});

  const RankPlace& place() const override { return mesh_.place(); }
  TensorParallel& tensor() override;
  TokenDispatcher& dispatcher() override;
  KvExchange& kv() override;
  SequenceSums& sequences() override;
  std::unique_ptr<ParamStore> make_param_store(ParameterSet& parameters,
                                               const ParamStoreOptions& options) override;
  void sum_over_ranks(DistStream dist, const Tensor& x) override;

  // What gradients cost on the wire since the start, over this rank's stores, which must still
  // live; seconds are those of the steps taken.
  GradTraffic traffic() const;
  // How long computing waits in all of these.
  ExposedTime& exposed() { return exposed_; }
  ReduceTimes& reduce_times() { return reduce_times_; }
  // What compression.method auto chooses, once there are stores.
  const AutoCompression* auto_compression() const { return auto_ ? &*auto_ : nullptr; }
  // What the stores hold of parameters; nothing where one rank is alone. Likewise.
  ShardBytes parameter_bytes() const;
  // Residuals of compressed gradients: what to read after TrainEngine::loaded_state(), in this
  // order. Likewise.
  std::vector<StateSlice> loaded_residuals(const SavedKinds& kinds) const;

 private:
  void split_by_nodes(const std::string& node);
  GradReducerOptions reducer_options(ParameterSet& parameters, const ParamStoreOptions& options,
                                     const ZeroOptions& zero, const ShardRanks& ranks);
  void measure_sums(ParameterSet& parameters, const ZeroOptions& zero, const ShardRanks& ranks,
                    const GradReducerOptions& options);

  Config config_;
  ProcessMesh& mesh_;
  Backend& backend_;
  ExposedTime exposed_;
  LocalDistribution local_;
  std::optional<RankTensorParallel> tensor_;
  std::optional<ExpertParallel> experts_;
  std::optional<ContextParallel> context_;
  std::optional<RankSequenceSums> sequences_;
  // By ReduceGroup: its ranks, and how they lie on nodes, in communicators that the first of the
  // groups with the same ranks owns.
  std::array<NodeSplit, kReduceGroups> reduce_;
  std::optional<AutoCompression> auto_;
  ReduceTimes reduce_times_;
  std::vector<ParamShards*> stores_;
};

}  // namespace dstrain
