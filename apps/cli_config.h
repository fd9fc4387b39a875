// The options that say what the configuration is: --config, --set, and short names of single keys.
#pragma once

#include <string>
#include <vector>

#include "apps/cli_scan.h"
#include "apps/commands.h"

namespace dstrain {

// An option that sets one key of the job file.
struct Alias {
  const char* option;
  const char* key;
  const char* type;
  const char* meaning;
};
const std::vector<Alias>& config_aliases();

constexpr const char* kAccumulationOption = "--gradient_accumulation";

// Later options win. A value that its key cannot take, and a --set without a key, are UsageErrors.
ConfigSource config_source(const ScannedLine& line);

// "--lr expects a number, got 'abc'", with the hint on its own line.
[[noreturn]] void refuse_value(const std::string& option, const std::string& reason,
                               const std::string& hint = "");

}  // namespace dstrain
