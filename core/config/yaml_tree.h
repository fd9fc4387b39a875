// A strict reader of a small YAML: maps, lists and scalars of one document.
// Anchors, aliases, tags, a second document and nesting beyond 32 levels are refused while the text
// is scanned, before any node of them exists; duplicate keys are reported, all of them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/config/problems.h"

namespace dstrain {

struct YamlEntry;

struct YamlNode {
  enum class Kind {
    null,
    scalar,
    list,
    map,
    argument,  // text of a command-line argument; its meaning depends on the field's type
    element,   // one element of a list, by `index`; from the command line too
  };
  Kind kind = Kind::null;
  std::string text;        // scalar, argument
  bool is_quoted = false;  // scalar
  int64_t index = 0;       // element
  Location location;
  std::vector<YamlNode> items;     // list; element: the one value
  std::vector<YamlEntry> entries;  // map

  const YamlNode* find(const std::string& key) const;  // null where absent
};

struct YamlEntry {
  std::string key;
  Location location;  // of the key
  YamlNode value;
};

constexpr int64_t kMaxYamlBytes = 256 * 1024;
constexpr int kMaxYamlDepth = 32;

// Parses the text of `source`. Returns nothing if the text cannot be read as YAML; the problem is
// then in `problems`. An empty document is a null node.
std::optional<YamlNode> parse_yaml(int source, const std::string& text, Problems& problems);

// "text is valid UTF-8": the offset of the first byte that is not, or nothing.
std::optional<size_t> find_invalid_utf8(std::string_view text);

}  // namespace dstrain
