// One value of the command line as a YAML layer of its own.
#pragma once

#include "core/config/config_io.h"
#include "core/config/yaml_tree.h"

namespace dstrain {

// The node that load_layer() takes for "a.b[0].c" and its text; an index may also be written ".0".
// Problems of the key's form and of the text's encoding are added to `problems`; the node is then
// null.
YamlNode override_layer(const Override& value, SourceTexts& sources, Problems& problems);

}  // namespace dstrain
