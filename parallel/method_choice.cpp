#include "parallel/method_choice.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <sstream>
#include <string_view>

#include "core/base/error.h"

namespace dstrain {
namespace {

size_t index_of(CompressionMethod method) {
  const auto at = std::find(kSumMethods.begin(), kSumMethods.end(), method);
  DSTRAIN_CHECK(at != kSumMethods.end(), "a method that sums gradients");
  return static_cast<size_t>(at - kSumMethods.begin());
}

std::optional<CompressionMethod> method_named(std::string_view name) {
  for (const CompressionMethod method : kSumMethods)
    if (enum_name(method) == name) return method;
  return std::nullopt;
}

template <class Int>
std::optional<Int> whole_number(const std::string& text) {
  Int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

}  // namespace

void SumTimes::add(int64_t elements, double seconds) {
  DSTRAIN_CHECK(elements > (points_.empty() ? 0 : points_.back().elements),
                "sizes of measured sums ascend");
  points_.push_back({elements, seconds});
}

double SumTimes::at(int64_t elements) const {
  const Point &first = points_.front(), &last = points_.back();
  if (elements <= first.elements) return first.seconds;
  const auto ratio = [](int64_t a, int64_t b) {
    return static_cast<double>(a) / static_cast<double>(b);
  };
  if (elements >= last.elements) return last.seconds * ratio(elements, last.elements);
  const auto above = std::find_if(points_.begin(), points_.end(),
                                  [&](const Point& point) { return point.elements >= elements; });
  const Point &a = above[-1], &b = above[0];
  return a.seconds +
         (b.seconds - a.seconds) * ratio(elements - a.elements, b.elements - a.elements);
}

SumTimes& MethodTimes::of(CompressionMethod method) {
  return by_method[index_of(method)];
}
const SumTimes& MethodTimes::of(CompressionMethod method) const {
  return by_method[index_of(method)];
}

CompressionMethod choose_method(const MethodTimes& times, int64_t elements,
                                std::optional<CompressionMethod> earlier) {
  DSTRAIN_CHECK(!times.empty(), "times of whole sums are needed to choose");
  CompressionMethod best = CompressionMethod::none;
  const auto seconds = [&](CompressionMethod method) { return times.of(method).at(elements); };
  for (size_t m = 1; m < kSumMethods.size(); ++m) {
    const CompressionMethod method = kSumMethods[m];
    if (!times.of(method).empty() && seconds(method) < kLargestShare[m] * seconds(best) &&
        seconds(method) < seconds(best) - kLeastSaving)
      best = method;
  }
  const bool stays = earlier && !times.of(*earlier).empty() &&
                     seconds(*earlier) <= seconds(CompressionMethod::none) &&
                     seconds(best) >= kMuchFaster * seconds(*earlier);
  return stays ? *earlier : best;
}

ChosenMethods ChosenMethods::parse(const std::string& text) {
  ChosenMethods chosen;
  std::istringstream groups(text);
  for (std::string group; std::getline(groups, group, ';');) {
    const size_t colon = group.find(':');
    if (colon == std::string::npos) continue;
    std::istringstream head(group.substr(0, colon)), sizes(group.substr(colon + 1));
    std::string name, of, count;
    head >> name >> of >> count;
    const auto ranks = whole_number<int>(count);
    for (std::string size; ranks && std::getline(sizes, size, ',');) {
      std::istringstream words(size);
      std::string number, method_name;
      words >> number >> method_name;
      const auto elements = whole_number<int64_t>(number);
      const auto method = method_named(method_name);
      if (elements && method) chosen.add(name, *ranks, *elements, *method);
    }
  }
  return chosen;
}

std::string ChosenMethods::text() const {
  std::string text, last_head;
  for (const auto& [key, method] : methods_) {
    const auto& [group, ranks, elements] = key;
    const std::string head = fmt::format("{} of {}:", group, ranks);
    if (head != last_head)
      text += (text.empty() ? "" : "; ") + head;
    else
      text += ",";
    text += fmt::format(" {} {}", elements, enum_name(method));
    last_head = head;
  }
  return text;
}

void ChosenMethods::add(const std::string& group, int ranks, int64_t elements,
                        CompressionMethod method) {
  methods_.insert_or_assign({group, ranks, elements}, method);
}

void ChosenMethods::add(const ChosenMethods& other) {
  methods_.insert(other.methods_.begin(), other.methods_.end());
}

std::optional<CompressionMethod> ChosenMethods::find(const std::string& group, int ranks,
                                                     int64_t elements) const {
  const auto at = methods_.find({group, ranks, elements});
  return at == methods_.end() ? std::nullopt : std::optional(at->second);
}

}  // namespace dstrain
