// compression.method auto of one rank: measures what sums of gradients take, chooses a method for
// each range before memory is planned, and sees to it that all ranks choose alike. Residuals are
// planned for the ranges that are compressed.
//
// A job that goes on from a checkpoint keeps what was chosen before (kMuchFaster). Ranges
// that were compressed then and are not now add what was not sent to their first sum.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "parallel/grad_reducer.h"
#include "parallel/method_choice.h"
#include "parallel/shard_layout.h"

namespace dstrain {

// What a checkpoint says of compression; empty for a start from scratch.
struct EarlierCompression {
  ChosenMethods methods;
  SavedKinds kinds;
};

const char* group_name(ReduceGroup group);  // "replicated"

class AutoCompression {
 public:
  explicit AutoCompression(EarlierCompression earlier) : earlier_(std::move(earlier)) {}

  // Measures sums of ranges of up to `largest` elements, on any rank, where no times are known yet
  // and there are such ranges. A collective call of all ranks of `world`.
  void measure(ReduceGroup group, const GradReducerOptions& options, const ReduceRanks& ranks,
               int64_t largest, Communicator& world, Backend& backend);
  // What measure() finds; for a group of the same ranks as another, what it has found there.
  const MethodTimes& times(ReduceGroup group) const { return times_[number_of(group)]; }
  void set_times(ReduceGroup group, const MethodTimes& times) { times_[number_of(group)] = times; }

  // After measure(): as make_grad_reducer(), with a method for each range. A collective call of all
  // ranks of the group. RuntimeFailure if they have not chosen alike.
  std::unique_ptr<GradReducer> make_reducer(ReduceGroup group, const GradReducerOptions& options,
                                            const ReduceRanks& ranks,
                                            const ParameterSet& parameters,
                                            const std::vector<GradRange>& ranges);

  // For ranges of this rank, in a line: "auto: none for 3 ranges, 4,096 elements, int8 for ...".
  std::string describe() const;
  const ChosenMethods& chosen() const { return chosen_; }

 private:
  CompressionMethod choose(ReduceGroup group, const ReduceRanks& ranks, int64_t elements);
  void count(CompressionMethod method, int64_t elements, const MethodTimes& times);

  const EarlierCompression earlier_;
  std::array<MethodTimes, kReduceGroups> times_;  // by ReduceGroup
  ChosenMethods chosen_;
  // What is told: of the ranges with each method, and of all ranges if they had it.
  struct Total {
    int64_t ranges = 0, elements = 0;
    double seconds = 0, seconds_of_all = 0;
  };
  std::array<Total, kSumMethods.size()> totals_;  // by kSumMethods
  int64_t kept_ = 0;                              // ranges that have what the checkpoint says
};

// For a plan without ranks: the method that takes the most memory of those that auto may choose.
CompressionMethod largest_method(const CompressionConfig& compression);

}  // namespace dstrain
