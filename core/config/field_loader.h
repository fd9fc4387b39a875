// Puts the values of one YAML layer into a Config: keys, types and ranges are checked field by
// field, every problem is collected, and each value's origin is noted.
#pragma once

#include <map>
#include <string>

#include "core/config/config_io.h"
#include "core/config/field_tree.h"
#include "core/config/yaml_tree.h"

namespace dstrain {

struct LoadContext {
  SourceTexts& sources;
  Problems& problems;
  std::map<std::string, Origin>& origins;
  Origin::Kind kind;  // of the layer
};

// `layer` is a map, or null for a file without any key.
void load_layer(const YamlNode& layer, Config& config, LoadContext& context);

}  // namespace dstrain
