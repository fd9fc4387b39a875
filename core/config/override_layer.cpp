#include "core/config/override_layer.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/config/scalar.h"

namespace dstrain {

using Kind = YamlNode::Kind;

YamlNode override_layer(const Override& value, SourceTexts& sources, Problems& problems) {
  const Location location{sources.add_argument(value.origin), 0, 0, 1};
  YamlNode node;
  node.kind = Kind::argument;
  node.location = location;
  node.text = value.value;
  if (find_invalid_utf8(value.value)) {
    problems.add(location, "the value is not valid UTF-8");
    return {};
  }
  // From the innermost part outwards; "[3]" and ".3" are both an index.
  std::string key = value.key;
  std::replace(key.begin(), key.end(), '[', '.');
  key.erase(std::remove(key.begin(), key.end(), ']'), key.end());
  int depth = 0;
  while (true) {
    const size_t dot = key.rfind('.');
    const std::string part = dot == std::string::npos ? key : key.substr(dot + 1);
    if (part.empty() || ++depth > kMaxYamlDepth) {
      problems.add(location, fmt::format("{} is not a key", quote(value.key)),
                   "keys look like optimizer.lr or data.train[0].path");
      return {};
    }
    YamlNode outer;
    outer.location = location;
    const bool is_index =
        std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (is_index) {
      outer.kind = Kind::element;
      outer.index = part.size() < 10 ? std::stoll(part) : INT32_MAX;
      outer.items.push_back(std::move(node));
    } else {
      outer.kind = Kind::map;
      outer.entries.push_back({part, location, std::move(node)});
    }
    node = std::move(outer);
    if (dot == std::string::npos) return node;
    key.resize(dot);
  }
}

}  // namespace dstrain
