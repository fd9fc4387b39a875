#include "apps/job_agreement.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <vector>

#include "core/base/error.h"
#include "core/config/config_io.h"

namespace dstrain {
namespace {

// Two jobs that have nothing to do with each other differ in nearly every key.
constexpr size_t kMostNamed = 5;

// The first rank's text and that of the first rank whose text is another one.
struct Disagreement {
  std::string place;  // of the other: "rank 3 on node2"
  std::string first, other;
};

std::optional<Disagreement> find_disagreement(Communicator& world, const std::string& machine,
                                              const std::string& text) {
  const std::vector<std::string> texts = world.all_gather_text(text);
  const std::vector<std::string> machines = world.all_gather_text(machine);
  const auto other = std::find_if(texts.begin(), texts.end(),
                                  [&](const std::string& t) { return t != texts.front(); });
  if (other == texts.end()) return std::nullopt;
  const auto rank = static_cast<size_t>(other - texts.begin());
  return Disagreement{fmt::format("rank {} on {}", rank, machines[rank]), texts.front(), *other};
}

std::string list(std::vector<std::string> names) {
  const size_t all = names.size();
  if (all > kMostNamed) names.resize(kMostNamed);
  return fmt::format("{}{}", fmt::join(names, ", "),
                     all > kMostNamed ? fmt::format(" and {} more", all - kMostNamed) : "");
}

}  // namespace

void require_same_job(Communicator& world, const std::string& machine, const Config& config) {
  Config shared = config;
  shared.run.threads = Config().run.threads;
  shared.launch = {};
  const auto found = find_disagreement(world, machine, dump_config(shared));
  if (!found) return;
  throw ConfigError(fmt::format(
      "{} was started with another job than rank 0: {}; every host needs the same job file, and "
      "every rank the same options",
      found->place,
      list(diff_config(parse_config_text(found->first, "the job of rank 0"),
                       parse_config_text(found->other, "the job of " + found->place)))));
}

void require_same_data(Communicator& world, const std::string& machine,
                       const std::map<std::string, std::string>& prints) {
  std::string text;
  for (const auto& [name, print] : prints) text += fmt::format("{} {}\n", print, name);
  const auto found = find_disagreement(world, machine, text);
  if (!found) return;
  std::vector<std::string> names;
  std::istringstream first(found->first), other(found->other);
  for (std::string a, b; std::getline(first, a) && std::getline(other, b);)
    if (a != b) names.push_back(a.substr(a.find(' ') + 1));
  throw DataError(
      fmt::format("{} finds other contents than rank 0 in {}; copy the same files to every host",
                  found->place, list(names)));
}

}  // namespace dstrain
