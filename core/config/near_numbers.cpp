#include "core/config/near_numbers.h"

#include <fmt/format.h>

#include <iterator>
#include <set>

namespace dstrain {

std::string nearest_divisors(int64_t n, int64_t wanted) {
  std::set<int64_t> divisors;
  for (int64_t d = 1; d * d <= n; ++d)
    if (n % d == 0) divisors.insert({d, n / d});
  const auto above = divisors.lower_bound(wanted);
  std::string text;
  if (above != divisors.begin()) text = fmt::to_string(*std::prev(above));
  if (above != divisors.end()) text += (text.empty() ? "" : " or ") + fmt::to_string(*above);
  return text;
}

std::string nearest_multiples(int64_t step, int64_t n) {
  const int64_t below = n / step * step;
  return below == 0 ? fmt::to_string(step) : fmt::format("{} or {}", below, below + step);
}

}  // namespace dstrain
