#include "parallel/rank_distribution.h"

#include <algorithm>
#include <iterator>

#include "parallel/timed_reducer.h"

namespace dstrain {
namespace {

constexpr size_t index_of(ReduceGroup group) { return static_cast<size_t>(group); }

MeshGroup ranks_of(ReduceGroup group) {
  switch (group) {
    case ReduceGroup::tensor_cut:
      return MeshGroup::data_context;
    case ReduceGroup::replicated:
      return MeshGroup::stage;
    case ReduceGroup::expert:
      return MeshGroup::expert_data;
  }
  return MeshGroup::stage;
}

}  // namespace

RankDistribution::RankDistribution(const Config& config, ProcessMesh& mesh, Backend& backend,
                                   const std::string& node)
    : config_(config),
      mesh_(mesh),
      backend_(backend),
      exposed_(backend, /*measures=*/mesh.shape().ranks() > 1) {
  const RankPlace& place = mesh.place();
  if (place.tensor.size > 1) tensor_.emplace(mesh.group(MeshGroup::tensor), exposed_);
  if (place.expert.size > 1)
    experts_.emplace(mesh.group(MeshGroup::expert), backend, exposed_,
                     config.parallel.expert_buffer);
  if (place.context.size > 1)
    context_.emplace(mesh.group(MeshGroup::context), exposed_, config.train.micro_batch,
                     config.data.seq_len);
  if (place.tensor.size * place.context.size > 1)
    sequences_.emplace(mesh.group(MeshGroup::tensor_context), exposed_,
                       place.tensor.size > 1 ? CommKind::tensor : CommKind::context);
  for (const ReduceGroup group : {ReduceGroup::tensor_cut, ReduceGroup::replicated, ReduceGroup::expert})
    reduce_[index_of(group)] = split_by_node(mesh.group(ranks_of(group)), node);
}

TensorParallel& RankDistribution::tensor() {
  return tensor_ ? static_cast<TensorParallel&>(*tensor_) : local_.tensor();
}

TokenDispatcher& RankDistribution::dispatcher() {
  return experts_ ? static_cast<TokenDispatcher&>(*experts_) : local_.dispatcher();
}

KvExchange& RankDistribution::kv() { return context_ ? static_cast<KvExchange&>(*context_) : local_.kv(); }

SequenceSums& RankDistribution::sequences() {
  return sequences_ ? static_cast<SequenceSums&>(*sequences_) : local_.sequences();
}

std::unique_ptr<ParamStore> RankDistribution::make_param_store(ParameterSet& parameters,
                                                               const ParamStoreOptions& options) {
  if (mesh_.shape().ranks() == 1) return local_.make_param_store(parameters, options);
  ZeroOptions zero;
  zero.stage = static_cast<int>(config_.parallel.zero);
  zero.keep_full_grads = config_.parallel.keep_full_grads;
  const Parameter* norm = parameters.find("model.norm.weight");
  zero.head_block = norm ? norm->spec.block : -1;
  ShardRanks ranks;
  for (const ReduceGroup group : {ReduceGroup::tensor_cut, ReduceGroup::replicated, ReduceGroup::expert})
    ranks.groups[index_of(group)] = &mesh_.group(ranks_of(group));
  if (mesh_.group(MeshGroup::embedding).size() > 1) ranks.ties = &mesh_.group(MeshGroup::embedding);
  GradReducerOptions reducer;
  reducer.compression = config_.compression;
  reducer.hierarchical = config_.parallel.hierarchical;
  reducer.gathers = zero.stage == 0;
  reducer.dtype = stat_dtype(options.dtype);
  auto store = std::make_unique<ParamShards>(
      backend_, parameters, options, zero, ranks,
      [this, reducer](ReduceGroup group, const ParameterSet& set, std::vector<GradRange> ranges) {
        return std::make_unique<TimedReducer>(
            make_grad_reducer(reducer, reduce_[index_of(group)].ranks, set, std::move(ranges)));
      },
      exposed_);
  stores_.push_back(store.get());
  return store;
}

void RankDistribution::make_memory(Backend& backend, Stream& stream, const OwnerVisitor& visit) {
  if (context_) context_->make_memory(backend, stream, visit);
}

void RankDistribution::sum_over_ranks(DistStream dist, const Tensor& x) {
  if (dist.dry || mesh_.world().size() == 1) return;
  exposed_.on_computing(CommKind::results, dist.stream,
                        [&] { mesh_.world().all_reduce_sum(dist.stream, x); });
}

GradTraffic RankDistribution::traffic() const {
  GradTraffic sum;
  for (const ParamShards* store : stores_) sum += store->traffic();
  return sum;
}

std::vector<StateSlice> RankDistribution::loaded_residuals(const SavedKinds& kinds) const {
  std::vector<StateSlice> slices;
  for (const ParamShards* store : stores_)
    std::ranges::move(store->loaded_residuals(kinds), std::back_inserter(slices));
  return slices;
}

ShardBytes RankDistribution::parameter_bytes() const {
  ShardBytes sum;
  for (const ParamShards* store : stores_) {
    const ShardBytes part = store->bytes();
    sum.values += part.values;
    sum.gather_slots += part.gather_slots;
    sum.gradients += part.gradients;
    sum.gradient_slots += part.gradient_slots;
    sum.moments += part.moments;
    sum.low += part.low;
  }
  return sum;
}

}  // namespace dstrain
