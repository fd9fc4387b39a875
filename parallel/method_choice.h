// How compression.method auto chooses: from the seconds that sums of gradients took for ranges of a
// few sizes, with each method, to the method for a range.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/config/parallel_config.h"

namespace dstrain {

// In this order: each loses more than those before it.
inline constexpr std::array kSumMethods = {CompressionMethod::none, CompressionMethod::int8,
                                           CompressionMethod::topk};

// Seconds of sums by the elements of the range. Linear between measured sizes, which is a latency
// and a rate; below the smallest as long as there, above the largest in proportion to it.
class SumTimes {
 public:
  // More elements than the points before.
  void add(int64_t elements, double seconds);
  bool empty() const { return points_.empty(); }
  double at(int64_t elements) const;  // not empty

 private:
  struct Point {
    int64_t elements = 0;
    double seconds = 0;
  };
  std::vector<Point> points_;
};

// By kSumMethods; those without times are no candidates, which `none` always is.
struct MethodTimes {
  std::array<SumTimes, kSumMethods.size()> by_method;

  bool empty() const { return by_method[0].empty(); }
  SumTimes& of(CompressionMethod method);
  const SumTimes& of(CompressionMethod method) const;
};

// To be taken over those before it, a method has to need less than this share of their time, and
// to save so many seconds: sums hide behind computing in part, compressing takes time from it, and
// what is lost is lost in any case.
inline constexpr std::array kLargestShare = {1.0, 0.8, 0.5};  // by kSumMethods
inline constexpr double kLeastSaving = 50e-6;
// `earlier`, which the checkpoint of a resumed run names, stays unless it needs more than whole
// sums now, or what would be taken less than this share of its time: times of one link differ a
// little from start to start, and a run that goes on over the same link is to repeat its bits.
inline constexpr double kMuchFaster = 0.75;

CompressionMethod choose_method(const MethodTimes& times, int64_t elements,
                                std::optional<CompressionMethod> earlier = {});

// What a job has chosen, by the group of ranks that sum and the size of the range: with it a
// resumed run chooses alike.
class ChosenMethods {
 public:
  // What it does not understand is left out.
  static ChosenMethods parse(const std::string& text);
  std::string text() const;  // "replicated of 4: 4096 none, 1048576 int8; expert of 2: ..."

  void add(const std::string& group, int ranks, int64_t elements, CompressionMethod method);
  void add(const ChosenMethods& other);
  std::optional<CompressionMethod> find(const std::string& group, int ranks,
                                        int64_t elements) const;

 private:
  std::map<std::tuple<std::string, int, int64_t>, CompressionMethod> methods_;
};

}  // namespace dstrain
