// Named architectures for model.preset.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/config/config.h"

namespace dstrain {

struct Preset {
  std::string name;
  std::string description;  // one line
  ModelConfig model;        // model.preset is its name
};

const std::vector<Preset>& presets();

// Nothing if there is no preset of that name.
std::optional<ModelConfig> find_preset(std::string_view name);

// What to tell a user who named no known preset: a near name, or all of them.
std::string suggest_preset(std::string_view name);

}  // namespace dstrain
