#include "parallel/rank_distribution.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <sstream>

#include "parallel/timed_reducer.h"

namespace dstrain {
namespace {

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

// Elements of the largest range of each ReduceGroup, on any rank.
std::array<int64_t, kReduceGroups> largest_ranges(const ShardLayout& layout, Communicator& world) {
  std::array<int64_t, kReduceGroups> largest = {};
  for (const ShardRange& range : layout.ranges()) {
    int64_t& most = largest[number_of(range.group.reduce)];
    most = std::max(most, range.padded());
  }
  const std::string mine = fmt::format("{}", fmt::join(largest, " "));
  for (const std::string& text : world.all_gather_text(mine)) {
    std::istringstream numbers(text);
    for (int64_t& most : largest) {
      int64_t number = 0;
      numbers >> number;
      most = std::max(most, number);
    }
  }
  return largest;
}

}  // namespace

RankDistribution::RankDistribution(const Config& config, ProcessMesh& mesh, Backend& backend,
                                   const std::string& node, const EarlierCompression& earlier)
    : config_(config),
      mesh_(mesh),
      backend_(backend),
      exposed_(backend, /*measures=*/mesh.shape().ranks() > 1),
      reduce_times_(backend) {
  const RankPlace& place = mesh.place();
  if (place.tensor.size > 1) tensor_.emplace(mesh.group(MeshGroup::tensor), exposed_);
  if (place.expert.size > 1)
    experts_.emplace(mesh.group(MeshGroup::expert), backend, exposed_,
                     config.parallel.expert_buffer);
  if (place.context.size > 1) context_.emplace(mesh.group(MeshGroup::context), backend, exposed_);
  if (place.tensor.size * place.context.size > 1)
    sequences_.emplace(mesh.group(MeshGroup::tensor_context), exposed_,
                       place.tensor.size > 1 ? CommKind::tensor : CommKind::context);
  split_by_nodes(node);
  if (config.compression.method == CompressionMethod::automatic && !mesh.is_planned())
    auto_.emplace(earlier);
}

// Groups of the same ranks share the parts of their communicator as well.
void RankDistribution::split_by_nodes(const std::string& node) {
  const bool two_levels = may_sum_in_two_levels(config_.compression, config_.parallel.hierarchical);
  for (const ReduceGroup group :
       {ReduceGroup::tensor_cut, ReduceGroup::replicated, ReduceGroup::expert}) {
    Communicator& all = mesh_.group(ranks_of(group));
    const auto same =
        std::ranges::find(reduce_, &all, [](const NodeSplit& split) { return split.ranks.all; });
    if (same == reduce_.end())
      reduce_[number_of(group)] = split_by_node(all, node, two_levels);
    else
      reduce_[number_of(group)].ranks = same->ranks;
  }
}

TensorParallel& RankDistribution::tensor() {
  return tensor_ ? static_cast<TensorParallel&>(*tensor_) : local_.tensor();
}

TokenDispatcher& RankDistribution::dispatcher() {
  return experts_ ? static_cast<TokenDispatcher&>(*experts_) : local_.dispatcher();
}

KvExchange& RankDistribution::kv() {
  return context_ ? static_cast<KvExchange&>(*context_) : local_.kv();
}

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
  for (const ReduceGroup group :
       {ReduceGroup::tensor_cut, ReduceGroup::replicated, ReduceGroup::expert})
    ranks.groups[number_of(group)] = &mesh_.group(ranks_of(group));
  if (mesh_.group(MeshGroup::embedding).size() > 1) ranks.ties = &mesh_.group(MeshGroup::embedding);
  const GradReducerOptions reducer = reducer_options(parameters, options, zero, ranks);
  auto store = std::make_unique<ParamShards>(
      backend_, parameters, options, zero, ranks,
      [this, reducer](ReduceGroup group, const ParameterSet& set, std::vector<GradRange> ranges) {
        const ReduceRanks& of = reduce_[number_of(group)].ranks;
        return std::make_unique<TimedReducer>(
            auto_ ? auto_->make_reducer(group, reducer, of, set, ranges)
                  : make_grad_reducer(reducer, of, set, std::move(ranges)),
            reduce_times_);
      },
      exposed_);
  stores_.push_back(store.get());
  return store;
}

// A plan without ranks takes the most that auto could choose.
GradReducerOptions RankDistribution::reducer_options(ParameterSet& parameters,
                                                     const ParamStoreOptions& options,
                                                     const ZeroOptions& zero,
                                                     const ShardRanks& ranks) {
  GradReducerOptions reducer;
  reducer.compression = config_.compression;
  reducer.hierarchical = config_.parallel.hierarchical;
  reducer.gathers = zero.stage == 0;
  reducer.dtype = stat_dtype(options.dtype);
  reducer.rounds = config_.precision.reduce == ReduceType::bf16;
  if (config_.compression.method != CompressionMethod::automatic) return reducer;
  if (!auto_)
    reducer.compression.method = largest_method(config_.compression);
  else if (options.training)
    measure_sums(parameters, zero, ranks, reducer);
  return reducer;
}

void RankDistribution::measure_sums(ParameterSet& parameters, const ZeroOptions& zero,
                                    const ShardRanks& ranks, const GradReducerOptions& options) {
  std::array<int64_t, kReduceGroups> largest =
      largest_ranges(ShardLayout(parameters, ranks.places(), zero.head_block), mesh_.world());
  // Groups of as many ranks as the stage has are those ranks.
  const auto is_stage = [&](ReduceGroup group) {
    return ranks.groups[number_of(group)]->size() == mesh_.group(MeshGroup::stage).size();
  };
  constexpr ReduceGroup kStage = ReduceGroup::replicated;
  int64_t& of_stage = largest[number_of(kStage)];
  for (const ReduceGroup group : {ReduceGroup::tensor_cut, ReduceGroup::expert})
    if (is_stage(group)) of_stage = std::max(of_stage, largest[number_of(group)]);
  for (const ReduceGroup group : {kStage, ReduceGroup::tensor_cut, ReduceGroup::expert})
    if (group != kStage && is_stage(group))
      auto_->set_times(group, auto_->times(kStage));
    else
      auto_->measure(group, options, reduce_[number_of(group)].ranks, largest[number_of(group)],
                     mesh_.world(), backend_);
}

void RankDistribution::sum_over_ranks(DistStream dist, const Tensor& x) {
  if (dist.dry || mesh_.world().size() == 1) return;
  exposed_.on_computing(CommKind::results, dist.stream,
                        [&] { mesh_.world().all_reduce_sum(dist.stream, x); });
}

GradTraffic RankDistribution::traffic() const {
  GradTraffic sum;
  for (const ParamShards* store : stores_) sum += store->traffic();
  sum.reduce.seconds = reduce_times_.total().reduce;
  sum.gather.seconds = reduce_times_.total().gather;
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
