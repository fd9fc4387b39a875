#include "parallel/chosen_reducer.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "parallel/method_choice.h"

namespace dstrain {
namespace {

PieceLayout pieces_of(const GradRange& range) {
  return {range.begin, range.end, range.shard, range.shard};
}

bool has_residuals(const GradRange& range, const ParameterSet& parameters,
                   const SavedKinds& kinds) {
  return std::ranges::any_of(parameters.all(), [&](const Parameter& p) {
    return p.spec.trainable && p.offset >= range.begin && p.offset < range.end &&
           std::ranges::any_of(kinds(p), is_residual);
  });
}

}  // namespace

void ChosenReducer::make_memory(const OwnerVisitor& visit) {
  for (const auto& part : parts_) part->make_memory(visit);
}

void ChosenReducer::clear(DistStream dist) {
  for (const auto& part : parts_) part->clear(dist);
}

void ChosenReducer::begin_step(int64_t step) {
  for (const auto& part : parts_) part->begin_step(step);
}

void ChosenReducer::reduce_scatter(DistStream dist, int range, const Tensor& whole,
                                   const Tensor& shard) {
  const Place& place = places_.at(static_cast<size_t>(range));
  parts_[place.part]->reduce_scatter(dist, place.range, whole, shard);
}

void ChosenReducer::all_gather(DistStream dist, int range, const Tensor& shard,
                               const Tensor& whole) {
  const Place& place = places_.at(static_cast<size_t>(range));
  parts_[place.part]->all_gather(dist, place.range, shard, whole);
}

void ChosenReducer::end_step(DistStream dist, const StepScalars* scalars) {
  for (const auto& part : parts_) part->end_step(dist, scalars);
}

std::vector<StateSlice> ChosenReducer::saved() const {
  std::vector<StateSlice> all;
  for (const auto& part : parts_) std::ranges::move(part->saved(), std::back_inserter(all));
  return all;
}

std::vector<StateSlice> ChosenReducer::loaded(const SavedKinds& kinds) const {
  std::vector<StateSlice> all;
  for (const auto& part : parts_) std::ranges::move(part->loaded(kinds), std::back_inserter(all));
  return all;
}

GradTraffic ChosenReducer::traffic() const {
  GradTraffic sum;
  for (const auto& part : parts_) sum += part->traffic();
  return sum;
}

LeftoverReducer::LeftoverReducer(std::unique_ptr<GradReducer> sums, Communicator& ranks,
                                 const ParameterSet& parameters,
                                 const std::vector<GradRange>& ranges)
    : sums_(std::move(sums)), ranks_(ranks), parameters_(parameters) {
  for (const GradRange& range : ranges) {
    ranges_.push_back({pieces_of(range), elements_});
    elements_ += range.shard;
  }
}

void LeftoverReducer::make_memory(const OwnerVisitor& visit) {
  sums_->make_memory(visit);
  visit("gradient residuals", MemoryKind::device, [&](Arena& arena) {
    leftovers_ = arena.make(DType::f32, {elements_}, "residuals to be added");
  });
}

void LeftoverReducer::clear(DistStream dist) {
  sums_->clear(dist);
  dist.ops.fill(dist.stream, leftovers_, 0.0);
  for (Range& range : ranges_) range.is_pending = true;
}

void LeftoverReducer::reduce_scatter(DistStream dist, int range, const Tensor& whole,
                                     const Tensor& shard) {
  sums_->reduce_scatter(dist, range, whole, shard);
  Range& of = ranges_.at(static_cast<size_t>(range));
  if (dist.dry || !std::exchange(of.is_pending, false)) return;
  const Tensor sum_N = shard.view({shard.numel()});
  dist.ops.add(dist.stream, sum_N, leftover_of(of), sum_N);
}

// A step sums every range that has gradients, so there is something at the start alone.
std::vector<StateSlice> LeftoverReducer::saved() const {
  std::vector<StateSlice> slices;
  for (const Range& range : ranges_)
    if (range.is_pending)
      std::ranges::move(
          saved_leftovers(parameters_, range.layout, leftover_of(range), ranks_.rank()),
          std::back_inserter(slices));
  return slices;
}

std::vector<StateSlice> LeftoverReducer::loaded(const SavedKinds& kinds) const {
  std::vector<StateSlice> slices;
  for (const Range& range : ranges_)
    std::ranges::move(
        loaded_leftovers(parameters_, range.layout, leftover_of(range), ranks_.rank(), kinds),
        std::back_inserter(slices));
  return slices;
}

std::unique_ptr<GradReducer> make_chosen_reducer(const GradReducerOptions& options,
                                                 const std::vector<CompressionMethod>& methods,
                                                 const SavedKinds& kinds, const ReduceRanks& ranks,
                                                 const ParameterSet& parameters,
                                                 const std::vector<GradRange>& ranges) {
  DSTRAIN_CHECK(methods.size() == ranges.size(), "a method for each range");
  const bool takes_leftovers = kinds && options.compression.error_feedback;
  // Of each kind of part the ranges; the last one is for whole sums with leftovers.
  std::vector<std::vector<GradRange>> parts(kSumMethods.size() + 1);
  std::vector<ChosenReducer::Place> places;
  for (size_t i = 0; i < ranges.size(); ++i) {
    const auto method = std::find(kSumMethods.begin(), kSumMethods.end(), methods[i]);
    auto part = static_cast<size_t>(method - kSumMethods.begin());
    if (part == 0 && takes_leftovers && has_residuals(ranges[i], parameters, kinds))
      part = kSumMethods.size();
    places.push_back({part, static_cast<int>(std::ssize(parts[part]))});
    parts[part].push_back(ranges[i]);
  }
  std::vector<std::unique_ptr<GradReducer>> reducers;
  std::vector<size_t> number(parts.size());
  for (size_t part = 0; part < parts.size(); ++part) {
    if (parts[part].empty()) continue;
    GradReducerOptions of = options;
    of.compression.method = part < kSumMethods.size() ? kSumMethods[part] : CompressionMethod::none;
    auto reducer = make_grad_reducer(of, ranks, parameters, parts[part]);
    if (part == kSumMethods.size())
      reducer = std::make_unique<LeftoverReducer>(std::move(reducer), *ranks.all, parameters,
                                                  parts[part]);
    number[part] = reducers.size();
    reducers.push_back(std::move(reducer));
  }
  if (reducers.size() == 1) return std::move(reducers[0]);
  for (ChosenReducer::Place& place : places) place.part = number[place.part];
  return std::make_unique<ChosenReducer>(std::move(reducers), std::move(places));
}

}  // namespace dstrain
