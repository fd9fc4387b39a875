#include "parallel/dense_reducer.h"

namespace dstrain {
namespace {

PhaseTraffic both_levels(const PhaseTraffic& inside, const PhaseTraffic& between) {
  return {inside.sent + between.sent, inside.baseline, between.sent, inside.baseline_between_nodes};
}

}  // namespace

HierarchicalReducer::HierarchicalReducer(Communicator& intra, int nodes, DType dtype,
                                         const std::vector<GradRange>& ranges,
                                         std::unique_ptr<GradReducer> inter)
    : intra_(intra), nodes_(nodes), dtype_(dtype), inter_(std::move(inter)) {
  for (const GradRange& range : ranges) largest_shard_ = std::max(largest_shard_, range.shard);
}

void HierarchicalReducer::make_memory(const OwnerVisitor& visit) {
  visit("gradients on their way", MemoryKind::device, [&](Arena& arena) {
    node_sums_ = arena.make(dtype_, {nodes_ * largest_shard_}, "sums of this node");
  });
  inter_->make_memory(visit);
}

Tensor HierarchicalReducer::node_pieces(const Tensor& whole, int64_t shard, int node) const {
  const int64_t elements = intra_.size() * shard;
  return whole.view({whole.numel()}).rows(node * elements, (node + 1) * elements);
}

void HierarchicalReducer::reduce_scatter(DistStream dist, int range, const Tensor& whole,
                                         const Tensor& shard) {
  if (dist.dry) return;
  const int64_t n = shard.numel(), before = intra_.bytes_sent();
  const Tensor sums = node_sums_.rows(0, nodes_ * n);
  for (int node = 0; node < nodes_; ++node)
    intra_.reduce_scatter_sum(dist.stream, node_pieces(whole, n, node),
                              sums.rows(node * n, (node + 1) * n));
  inter_->reduce_scatter(dist, range, sums, shard);
  traffic_.reduce.sent += intra_.bytes_sent() - before;
  traffic_.reduce.baseline += (int64_t{nodes_} * intra_.size() - 1) * n * 4;
  traffic_.reduce.baseline_between_nodes += int64_t{nodes_ - 1} * intra_.size() * n * 4;
}

void HierarchicalReducer::all_gather(DistStream dist, int range, const Tensor& shard,
                                     const Tensor& whole) {
  if (dist.dry) return;
  const int64_t n = shard.numel(), before = intra_.bytes_sent();
  const Tensor pieces = node_sums_.rows(0, nodes_ * n);
  inter_->all_gather(dist, range, shard, pieces);
  for (int node = 0; node < nodes_; ++node)
    intra_.all_gather(dist.stream, pieces.rows(node * n, (node + 1) * n),
                      node_pieces(whole, n, node));
  traffic_.gather.sent += intra_.bytes_sent() - before;
  traffic_.gather.baseline += (int64_t{nodes_} * intra_.size() - 1) * n * 4;
  traffic_.gather.baseline_between_nodes += int64_t{nodes_ - 1} * intra_.size() * n * 4;
}

GradTraffic HierarchicalReducer::traffic() const {
  const GradTraffic between = inter_->traffic();
  return {both_levels(traffic_.reduce, between.reduce),
          both_levels(traffic_.gather, between.gather)};
}

Bf16Reducer::Bf16Reducer(std::unique_ptr<GradReducer> sums, const Communicator& ranks,
                         const std::vector<GradRange>& ranges)
    : sums_(std::move(sums)), ranks_(ranks) {
  for (const GradRange& range : ranges)
    largest_whole_ = std::max(largest_whole_, ranks.size() * range.shard);
}

void Bf16Reducer::make_memory(const OwnerVisitor& visit) {
  visit("gradients on their way", MemoryKind::device, [&](Arena& arena) {
    rounded_ = arena.make(DType::bf16, {largest_whole_}, "gradients in bf16");
  });
  sums_->make_memory(visit);
}

Tensor Bf16Reducer::own_part(const Tensor& rounded) const {
  const int64_t n = rounded.numel() / ranks_.size();
  return rounded.rows(ranks_.rank() * n, (ranks_.rank() + 1) * n);
}

void Bf16Reducer::reduce_scatter(DistStream dist, int range, const Tensor& whole,
                                 const Tensor& shard) {
  if (dist.dry) return;
  const Tensor rounded = rounded_.rows(0, whole.numel()), own = own_part(rounded);
  dist.ops.convert(dist.stream, whole, rounded);
  sums_->reduce_scatter(dist, range, rounded, own);
  dist.ops.convert(dist.stream, own, shard);
}

void Bf16Reducer::all_gather(DistStream dist, int range, const Tensor& shard, const Tensor& whole) {
  if (dist.dry) return;
  const Tensor rounded = rounded_.rows(0, whole.numel()), own = own_part(rounded);
  dist.ops.convert(dist.stream, shard, own);
  sums_->all_gather(dist, range, own, rounded);
  dist.ops.convert(dist.stream, rounded, whole);
}

}  // namespace dstrain
