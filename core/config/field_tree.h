// The fields of a Config as data: what each is, what it may hold, and its value as YAML text.
// Dumping, explaining, comparing, the schema and suggestions all walk this one tree.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/config/config.h"

namespace dstrain {

enum class FieldType {
  boolean,
  optional_boolean,  // true, false or null
  integer,
  auto_integer,  // "auto" or an integer
  number,
  number_pair,
  step_count,  // "100" or "5%"
  text,
  text_list,
  name,  // one of `names`
  section,
  section_list,
};

struct FieldNode {
  std::string name;
  std::string path;  // "optimizer.lr", "data.train[0].path"; empty at the root
  FieldType type = FieldType::section;
  Range range;
  std::string meaning;
  std::vector<std::string> names;    // name: the values
  std::string value;                 // as YAML; empty for sections
  std::vector<FieldNode> children;   // section: its fields; section_list: its elements
  std::vector<FieldNode> prototype;  // section_list: one element with its defaults

  bool is_leaf() const { return type != FieldType::section && type != FieldType::section_list; }
};

FieldNode describe(const Config& config);

// The node at a dotted path; data.train[0].path and data.train.0.path are the same, and
// data.train.path is the field of the prototype. Null if there is none.
const FieldNode* find_field(const FieldNode& root, const std::string& path);

// Calls `visit` for every leaf below `node`, in file order. With `prototypes`, also for the fields
// of list elements, as "data.train.path".
void for_each_leaf(const FieldNode& node, const std::function<void(const FieldNode&)>& visit,
                   bool prototypes = false);

// Block YAML of the tree. `comment` gives the text after a leaf's value; empty text gives none.
std::string to_yaml(const FieldNode& root,
                    const std::function<std::string(const FieldNode&)>& comment = nullptr);

// "a whole number", "auto or a whole number", "cpu or cuda", ... for messages.
std::string type_text(const FieldNode& node);

// "at least 0", "above 0", "0 to 1"; empty if everything is allowed.
std::string range_text(const Range& range);

// "did you mean" for a key that is unknown inside the section at `section_path`: a sibling, or the
// same name elsewhere. Empty if nothing is near.
std::string suggest_key(const FieldNode& root, const std::string& section_path,
                        const std::string& key);

// A text value as YAML: plain where that is safe, else in double quotes.
std::string yaml_text(std::string_view text);

}  // namespace dstrain
