#include "parallel/routing_margin.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace dstrain {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Choice {
 public:
  Choice(const ModelConfig& model, std::span<const float> scores_E, std::span<const float> bias_E,
         std::span<const int32_t> recorded_K)
      : recorded_K_(recorded_K) {
    for (size_t e = 0; e < scores_E.size(); ++e) {
      const float value = bias_E.empty() ? scores_E[e] : scores_E[e] + bias_E[e];
      value_E_.push_back(std::isnan(value) ? -kInfinity : static_cast<double>(value));
    }
    const bool grouped = model.topk_method != TopkMethod::greedy && model.n_group > 1;
    const size_t groups = grouped ? static_cast<size_t>(model.n_group) : 1;
    kept_ = grouped ? static_cast<size_t>(model.topk_group) : 1;
    size_ = value_E_.size() / groups;
    const bool best_two = model.topk_method == TopkMethod::noaux_tc && size_ > 1;
    for (size_t g = 0; g < groups; ++g) ranked_.emplace_back(group_score(g, best_two), g);
    std::stable_sort(ranked_.begin(), ranked_.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
  }

  double margin() const {
    std::vector<bool> kept(ranked_.size(), false);
    for (size_t r = 0; r < kept_; ++r) kept[ranked_[r].second] = true;
    double widest = 0;
    for (size_t r = kept_; r < ranked_.size(); ++r)
      if (holds_recorded(ranked_[r].second))
        widest = std::max(widest, ranked_[kept_ - 1].first - ranked_[r].first);
    if (widest > 0) return widest;

    double least = expert_margin(kept);
    if (least == 0 || kept_ == ranked_.size()) return least;
    const auto& [next_score, next] = ranked_[kept_];
    kept[next] = true;
    for (size_t r = 0; r < kept_; ++r) {
      const auto& [score, group] = ranked_[r];
      if (holds_recorded(group)) continue;
      kept[group] = false;
      least = std::min(least, std::max(score - next_score, expert_margin(kept)));
      kept[group] = true;
    }
    return std::max(least, std::numeric_limits<double>::min());  // it was another choice
  }

 private:
  double group_score(size_t g, bool best_two) const {
    double best = -kInfinity, second = -kInfinity;
    for (size_t e = g * size_; e < (g + 1) * size_; ++e) {
      second = std::max(second, std::min(best, value_E_[e]));
      best = std::max(best, value_E_[e]);
    }
    return best_two ? best + second : best;
  }
  bool is_recorded(size_t e) const {
    return std::find(recorded_K_.begin(), recorded_K_.end(), static_cast<int32_t>(e)) !=
           recorded_K_.end();
  }
  bool holds_recorded(size_t group) const {
    return std::any_of(recorded_K_.begin(), recorded_K_.end(),
                       [&](int32_t e) { return static_cast<size_t>(e) / size_ == group; });
  }
  // How much better the best expert of these groups is that was not recorded than the worst that
  // was; 0 if the recorded ones would be chosen.
  double expert_margin(const std::vector<bool>& kept) const {
    std::vector<size_t> order;
    for (size_t e = 0; e < value_E_.size(); ++e)
      if (kept[e / size_]) order.push_back(e);
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return value_E_[a] > value_E_[b]; });
    order.resize(std::min(order.size(), recorded_K_.size()));
    double preferred = -kInfinity, taken = kInfinity;
    for (const size_t e : order)
      if (!is_recorded(e)) preferred = std::max(preferred, value_E_[e]);
    for (const int32_t e : recorded_K_)
      if (std::find(order.begin(), order.end(), static_cast<size_t>(e)) == order.end())
        taken = std::min(taken, value_E_[static_cast<size_t>(e)]);
    if (taken == kInfinity) return 0;
    return std::max(preferred - taken, std::numeric_limits<double>::min());
  }

  std::span<const int32_t> recorded_K_;
  std::vector<double> value_E_;
  size_t kept_ = 1, size_ = 1;
  std::vector<std::pair<double, size_t>> ranked_;  // (score, group), best first
};

}  // namespace

double routing_margin(const ModelConfig& model, std::span<const float> scores_E,
                      std::span<const float> bias_E, std::span<const int32_t> recorded_K) {
  return Choice(model, scores_E, bias_E, recorded_K).margin();
}

}  // namespace dstrain
