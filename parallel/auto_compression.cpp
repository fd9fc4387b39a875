#include "parallel/auto_compression.h"

#include <fmt/format.h>

#include <utility>

#include "core/base/format_units.h"
#include "parallel/chosen_reducer.h"
#include "parallel/compression.h"
#include "parallel/sum_timing.h"

namespace dstrain {
namespace {

int64_t whole_elements(const GradRange& range, const ReduceRanks& ranks) {
  return range.shard * ranks.all->size();
}

std::string names_of(const std::vector<CompressionMethod>& methods) {
  std::string names;
  for (const CompressionMethod method : methods)
    names += fmt::format("{}{}", names.empty() ? "" : " ", enum_name(method));
  return names;
}

// Ranks that sum a range in different ways would wait for each other for ever.
void require_same(Communicator& ranks, const std::string& chosen) {
  const std::vector<std::string> all = ranks.all_gather_text(chosen);
  for (size_t r = 1; r < all.size(); ++r)
    if (all[r] != all[0])
      throw RuntimeFailure(fmt::format(
          "compression.method auto has chosen '{}' on the first of the ranks that sum gradients "
          "together and '{}' on rank {} of them, from times that should be the same on all; name a "
          "method",
          all[0], all[r], r));
}

}  // namespace

const char* group_name(ReduceGroup group) {
  static constexpr std::array kNames = {"tensor_cut", "replicated", "expert"};
  return kNames[static_cast<size_t>(group)];
}

void AutoCompression::measure(ReduceGroup group, const GradReducerOptions& options,
                              const ReduceRanks& ranks, int64_t largest, Communicator& world,
                              Backend& backend) {
  MethodTimes& times = times_[number_of(group)];
  if (times.empty() && largest > 0) times = time_sums(options, ranks, largest, world, backend);
}

CompressionMethod AutoCompression::choose(ReduceGroup group, const ReduceRanks& ranks,
                                          int64_t elements) {
  const MethodTimes& times = times_[number_of(group)];
  const std::string name = group_name(group);
  const int size = ranks.all->size();
  const CompressionMethod measured = choose_method(times, elements);
  const CompressionMethod method =
      choose_method(times, elements, earlier_.methods.find(name, size, elements));
  if (method != measured) ++kept_;
  chosen_.add(name, size, elements, method);
  return method;
}

void AutoCompression::count(CompressionMethod method, int64_t elements, const MethodTimes& times) {
  for (size_t m = 0; m < kSumMethods.size(); ++m) {
    const SumTimes& of = times.by_method[m];
    const double seconds = of.empty() ? 0 : of.at(elements);
    totals_[m].seconds_of_all += seconds;
    if (kSumMethods[m] != method) continue;
    ++totals_[m].ranges;
    totals_[m].elements += elements;
    totals_[m].seconds += seconds;
  }
}

std::unique_ptr<GradReducer> AutoCompression::make_reducer(ReduceGroup group,
                                                           const GradReducerOptions& options,
                                                           const ReduceRanks& ranks,
                                                           const ParameterSet& parameters,
                                                           const std::vector<GradRange>& ranges) {
  const bool compresses = can_compress(options.compression, ranks);
  std::vector<CompressionMethod> methods;
  for (const GradRange& range : ranges) {
    const int64_t elements = whole_elements(range, ranks);
    const bool is_choice = compresses && elements > 0;
    methods.push_back(is_choice ? choose(group, ranks, elements) : CompressionMethod::none);
    count(methods.back(), elements, is_choice ? times_[number_of(group)] : MethodTimes());
  }
  require_same(*ranks.all, names_of(methods));
  return make_chosen_reducer(options, methods, earlier_.kinds, ranks, parameters, ranges);
}

std::string AutoCompression::describe() const {
  std::string parts, others;
  double seconds = 0;
  for (size_t m = 0; m < kSumMethods.size(); ++m) {
    const Total& total = totals_[m];
    seconds += total.seconds;
    const std::string_view name = enum_name(kSumMethods[m]);
    if (total.ranges > 0)
      parts += fmt::format("{}{} for {} of {} elements", parts.empty() ? "" : ", ", name,
                           format_plural(total.ranges, "range"), format_grouped(total.elements));
    if (total.seconds_of_all > 0)
      others += fmt::format("{}{} {:.3g} ms", others.empty() ? "" : ", ", name,
                            1e3 * total.seconds_of_all);
  }
  if (parts.empty()) return "";
  std::string text = "auto: " + parts;
  if (seconds > 0)
    text += fmt::format("; predicted to sum once in {:.3g} ms, all with {}", 1e3 * seconds, others);
  if (kept_ > 0) text += fmt::format("; {} as in the checkpoint", format_plural(kept_, "range"));
  return text;
}

CompressionMethod largest_method(const CompressionConfig& compression) {
  const auto payload = [&](CompressionMethod method) {
    CompressionConfig config = compression;
    config.method = method;
    return GradCodec(config).payload_bytes(int64_t{1} << 20);
  };
  const bool may_be_topk = compression.density > 0;
  return may_be_topk && payload(CompressionMethod::topk) > payload(CompressionMethod::int8)
             ? CompressionMethod::topk
             : CompressionMethod::int8;
}

}  // namespace dstrain
