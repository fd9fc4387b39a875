#include "core/config/suggest.h"

#include <algorithm>
#include <cstdlib>

namespace dstrain {
namespace {

constexpr size_t kLongestWord = 64;  // longer ones get no suggestion, which bounds the work

}  // namespace

int edit_distance(std::string_view a, std::string_view b) {
  const size_t columns = b.size() + 1;
  std::vector<int> before_last(columns), last(columns), current(columns);
  for (size_t j = 0; j < columns; ++j) current[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    before_last.swap(last);
    last.swap(current);
    current[0] = static_cast<int>(i);
    for (size_t j = 1; j < columns; ++j) {
      const int replace = last[j - 1] + (a[i - 1] != b[j - 1]);
      current[j] = std::min({last[j] + 1, current[j - 1] + 1, replace});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        current[j] = std::min(current[j], before_last[j - 2] + 1);
    }
  }
  return current[b.size()];
}

std::optional<std::string> closest_word(std::string_view word,
                                        const std::vector<std::string>& candidates) {
  if (word.empty() || word.size() > kLongestWord) return std::nullopt;
  int best_distance = std::max<int>(1, static_cast<int>(word.size()) / 3);
  std::optional<std::string> best;
  for (const std::string& candidate : candidates) {
    const int length_gap =
        std::abs(static_cast<int>(candidate.size()) - static_cast<int>(word.size()));
    if (length_gap > best_distance) continue;
    const int distance = edit_distance(word, candidate);
    if (distance < best_distance || (distance == best_distance && !best)) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

}  // namespace dstrain
