#include "core/metrics/expert_load.h"

#include <algorithm>
#include <numeric>

namespace dstrain {

ExpertLoad expert_load(std::span<const int64_t> counts, int64_t layers, double balance_loss) {
  ExpertLoad load;
  load.balance_loss = balance_loss;
  if (layers == 0 || counts.empty()) return load;
  const size_t experts = counts.size() / static_cast<size_t>(layers);
  for (size_t layer = 0; layer < static_cast<size_t>(layers); ++layer) {
    const std::span<const int64_t> row = counts.subspan(layer * experts, experts);
    const double total = static_cast<double>(std::accumulate(row.begin(), row.end(), int64_t{0}));
    const double mean = total / static_cast<double>(experts);
    const double busiest = static_cast<double>(*std::max_element(row.begin(), row.end()));
    const double ratio = mean > 0 ? busiest / mean : 0;
    const int64_t dead = std::count(row.begin(), row.end(), 0);
    load.max_over_mean_worst = std::max(load.max_over_mean_worst, ratio);
    load.max_over_mean_average += ratio / static_cast<double>(layers);
    load.dead_worst = std::max(load.dead_worst, dead);
    load.dead_average += static_cast<double>(dead) / static_cast<double>(layers);
  }
  return load;
}

}  // namespace dstrain
