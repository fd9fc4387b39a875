#include "core/data/sample_order.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "core/base/error.h"

namespace dstrain {
namespace {

std::vector<double> weights_of(const std::vector<BatchSource>& sources) {
  std::vector<double> weights;
  for (const BatchSource& source : sources) weights.push_back(source.weight);
  return weights;
}

void check_length(const TokenDataset& dataset, int64_t seq_len, bool single_pass) {
  const int64_t needed = single_pass ? 2 : seq_len + 1;
  if (dataset.num_tokens() >= needed) return;
  if (single_pass)
    throw DataError(fmt::format("'{}' holds {} token: there is nothing to predict", dataset.path(),
                                dataset.num_tokens()));
  throw DataError(
      fmt::format("'{}' holds {} tokens, but one sequence takes data.seq_len + 1 = {}; lower "
                  "data.seq_len to {} "
                  "or use a larger dataset",
                  dataset.path(), dataset.num_tokens(), needed,
                  std::max<int64_t>(dataset.num_tokens() - 1, 1)));
}

}  // namespace

SampleOrder::SampleOrder(std::vector<BatchSource> sources, const PackOptions& options,
                         bool single_pass, int64_t start, std::vector<int64_t> skip)
    : sources_(std::move(sources)),
      options_(options),
      single_pass_(single_pass),
      position_(start),
      skip_(std::move(skip)),
      blend_(weights_of(sources_)),
      epochs_(sources_.size()) {
  DSTRAIN_CHECK(start >= 0 && options.seq_len >= 1, "bad start or sequence length");
  for (const BatchSource& source : sources_)
    check_length(*source.dataset, options.seq_len, single_pass);
  std::sort(skip_.begin(), skip_.end());
  if (!single_pass_) return;
  num_samples_ = 0;
  for (const BatchSource& source : sources_) {
    num_samples_ += EpochOrder::num_samples(*source.dataset, options_);
    ends_.push_back(num_samples_);
  }
}

SampleRef SampleOrder::next() {
  while (std::binary_search(skip_.begin(), skip_.end(), position_)) ++position_;
  if (single_pass_) {
    if (position_ >= num_samples_) return {};
    const int64_t id = position_++;
    const auto end = std::upper_bound(ends_.begin(), ends_.end(), id);
    const int64_t source = end - ends_.begin();
    return {id, source, 0, id - (source == 0 ? 0 : ends_[source - 1])};
  }
  const int64_t id = position_++;
  blend_.skip_to(id);
  const Blend::Draw draw = blend_.next();
  const int64_t per_epoch = EpochOrder::num_samples(dataset(draw.source), options_);
  return {id, draw.source, draw.index / per_epoch, draw.index % per_epoch};
}

const EpochOrder& SampleOrder::epoch_order(int64_t source, int64_t epoch) {
  CachedEpoch& cached = epochs_[source][epoch % 2];
  if (cached.epoch != epoch) {
    cached.order = std::make_unique<EpochOrder>(dataset(source), options_, source, epoch);
    cached.epoch = epoch;
  }
  return *cached.order;
}

}  // namespace dstrain
