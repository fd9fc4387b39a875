#include "core/data/blend.h"

#include <algorithm>
#include <cmath>

#include "core/base/error.h"

namespace dstrain {

Blend::Blend(const std::vector<double>& weights) : counts_(weights.size(), 0) {
  DSTRAIN_CHECK(!weights.empty(), "a blend has one source at least");
  for (double weight : weights)
    DSTRAIN_CHECK(std::isfinite(weight) && weight > 0, "weights are finite and above 0");
  // Scaled by a power of two, so that a weight keeps all its bits unless it is tiny.
  int exponent = 0;
  std::frexp(*std::max_element(weights.begin(), weights.end()), &exponent);
  for (double weight : weights) {
    const double scaled = std::ldexp(weight, 60 - exponent);  // the largest is in [2^59, 2^60)
    weights_.push_back(std::max<int64_t>(std::llround(scaled), 128));
    total_ += weights_.back();
  }
}

Blend::Draw Blend::next() {
  const __int128 n = position_ + 1;
  int64_t chosen = -1;
  for (int64_t s = 0; s < std::ssize(weights_); ++s) {
    if (counts_[s] * total_ >= weights_[s] * n) continue;  // would exceed ceil(w n)
    if (chosen < 0 || static_cast<__int128>(counts_[s] + 1) * weights_[chosen] <
                          static_cast<__int128>(counts_[chosen] + 1) * weights_[s])
      chosen = s;
  }
  ++position_;
  return {chosen, counts_[chosen]++};
}

void Blend::skip_to(int64_t position) {
  DSTRAIN_CHECK(position >= position_, "a blend only goes forward");
  if (weights_.size() == 1) counts_[0] = position_ = position;
  while (position_ < position) next();
}

}  // namespace dstrain
