#include "apps/cli_config.h"

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/config/scalar.h"

namespace dstrain {
namespace {

constexpr int64_t kMaxAccumulation = 1 << 30;

Override alias_override(const Alias& alias, const GivenOption& given) {
  Override value{alias.key, given.value, given.typed};
  const Problems problems = check_override(value);
  if (problems.empty()) return value;
  const Problem& first = problems.list().front();
  throw UsageError(given.typed + ": " + first.message +
                   (first.hint.empty() ? "" : "\nhint: " + first.hint));
}

Override set_override(const GivenOption& given) {
  const size_t equals = given.value.find('=');
  if (equals == std::string::npos || equals == 0)
    refuse_value(given.name, "needs KEY=VALUE, got " + quote(given.value),
                 "such as --set optimizer.lr=3e-4");
  return {given.value.substr(0, equals), given.value.substr(equals + 1), given.typed};
}

int64_t accumulation(const GivenOption& given) {
  const Parsed<int64_t> count = parse_int(given.value);
  if (!count.value) refuse_value(given.name, count.reason, count.hint);
  if (*count.value < 1 || *count.value > kMaxAccumulation)
    refuse_value(given.name,
                 fmt::format("must be 1 to {}, got {}", kMaxAccumulation, *count.value));
  return *count.value;
}

}  // namespace

const std::vector<Alias>& config_aliases() {
  static const std::vector<Alias> aliases = {
      {"--model", "model.preset", "PRESET", "named architecture; 'config explain model.preset'"},
      {"--quantization", "precision.quantization", "none|aware", "precision.quantization"},
      {"--precision", "precision.compute", "bf16|fp32|tf32", "precision.compute"},
      {"--batch_size", "train.global_batch", "N", "train.global_batch: sequences a step"},
      {"--lr", "optimizer.lr", "X", "optimizer.lr"},
      {"--warmup_steps", "schedule.warmup", "N", "schedule.warmup"},
  };
  return aliases;
}

ConfigSource config_source(const ScannedLine& line) {
  ConfigSource source;
  for (const GivenOption& given : line.options) {
    if (given.name == "--config") source.path = given.value;
    if (given.name == "--set") source.overrides.push_back(set_override(given));
    if (given.name == kAccumulationOption) source.gradient_accumulation = accumulation(given);
    for (const Alias& alias : config_aliases())
      if (given.name == alias.option) source.overrides.push_back(alias_override(alias, given));
  }
  return source;
}

void refuse_value(const std::string& option, const std::string& reason, const std::string& hint) {
  throw UsageError(fmt::format("{} {}{}", option, reason, hint.empty() ? "" : "\nhint: " + hint));
}

}  // namespace dstrain
