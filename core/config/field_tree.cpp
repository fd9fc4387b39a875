#include "core/config/field_tree.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/config/scalar.h"
#include "core/config/suggest.h"

namespace dstrain {
namespace {

// Fills `parent.children` from a struct's field list.
struct Describer {
  FieldNode& parent;

  template <class T>
  void operator()(const char* name, const T& member, const Range& range, const char* meaning) {
    FieldNode node;
    node.name = name;
    node.path = parent.path.empty() ? name : parent.path + "." + name;
    node.range = range;
    node.meaning = meaning;
    fill(node, member);
    parent.children.push_back(std::move(node));
  }

  static void fill(FieldNode& node, bool value) {
    node.type = FieldType::boolean;
    node.value = value ? "true" : "false";
  }
  static void fill(FieldNode& node, const std::optional<bool>& value) {
    node.type = FieldType::optional_boolean;
    node.value = !value ? "null" : *value ? "true" : "false";
  }
  static void fill(FieldNode& node, int64_t value) {
    node.type = FieldType::integer;
    node.value = fmt::to_string(value);
  }
  static void fill(FieldNode& node, AutoInt value) {
    node.type = FieldType::auto_integer;
    node.value = value.is_auto() ? "auto" : fmt::to_string(value.value);
  }
  static void fill(FieldNode& node, double value) {
    node.type = FieldType::number;
    node.value = format_double(value);
  }
  static void fill(FieldNode& node, const std::pair<double, double>& value) {
    node.type = FieldType::number_pair;
    node.value = fmt::format("[{}, {}]", format_double(value.first), format_double(value.second));
  }
  static void fill(FieldNode& node, const StepCount& value) {
    node.type = FieldType::step_count;
    node.value =
        value.percent ? format_double(value.value) + "%" : fmt::format("{:.0f}", value.value);
  }
  static void fill(FieldNode& node, const std::string& value) {
    node.type = FieldType::text;
    node.value = yaml_text(value);
  }
  static void fill(FieldNode& node, const std::vector<std::string>& value) {
    node.type = FieldType::text_list;
    for (const std::string& item : value)
      node.value += (node.value.empty() ? "" : ", ") + yaml_text(item);
    node.value = "[" + node.value + "]";
  }
  template <NamedEnum E>
  static void fill(FieldNode& node, E value) {
    node.type = FieldType::name;
    node.value = enum_name(value);
    for (const auto& entry : kEnumNames<E>) node.names.emplace_back(entry.name);
  }
  template <FieldStruct S>
  static void fill(FieldNode& node, const S& value) {
    node.type = FieldType::section;
    Describer children{node};
    S::fields(children, value);
  }
  template <FieldStruct S>
  static void fill(FieldNode& node, const std::vector<S>& value) {
    node.type = FieldType::section_list;
    for (size_t i = 0; i < value.size(); ++i) {
      FieldNode element;
      element.path = fmt::format("{}[{}]", node.path, i);
      element.meaning = node.meaning;
      fill(element, value[i]);
      node.children.push_back(std::move(element));
    }
    FieldNode prototype;
    prototype.path = node.path;
    fill(prototype, S{});
    node.prototype.push_back(std::move(prototype));
  }
};

// What other trainers call some of the keys.
constexpr std::pair<std::string_view, const char*> kForeignNames[] = {
    {"learning_rate", "optimizer.lr"},
    {"max_grad_norm", "optimizer.grad_clip"},
    {"batch_size", "train.global_batch"},
    {"global_batch_size", "train.global_batch"},
    {"micro_batch_size", "train.micro_batch"},
    {"gradient_accumulation_steps", "train.micro_batch"},
    {"max_steps", "train.steps"},
    {"warmup_steps", "schedule.warmup"},
    {"lr_scheduler", "schedule.name"},
    {"max_seq_len", "data.seq_len"},
    {"sequence_length", "data.seq_len"},
    {"num_experts", "model.n_routed_experts"},
    {"dtype", "precision.compute"},
};

const FieldNode* child_named(const FieldNode& node, std::string_view name) {
  for (const FieldNode& child : node.children)
    if (child.name == name) return &child;
  return nullptr;
}

// The pieces of "data.train[0].path": data, train, 0, path.
std::vector<std::string> split_path(std::string_view path) {
  std::vector<std::string> parts(1);
  for (char c : path) {
    if (c == '.' || c == '[') {
      parts.emplace_back();
    } else if (c != ']') {
      parts.back() += c;
    }
  }
  return parts;
}

void append_yaml(const FieldNode& node, int indent,
                 const std::function<std::string(const FieldNode&)>& comment, std::string& out) {
  const std::string margin(static_cast<size_t>(indent), ' ');
  for (const FieldNode& field : node.children) {
    const std::string note = comment && field.is_leaf() ? comment(field) : "";
    const std::string tail = note.empty() ? "\n" : "  # " + note + "\n";
    if (field.is_leaf()) {
      out += margin + field.name + ": " + field.value + tail;
    } else if (field.type == FieldType::section) {
      out += margin + field.name + ":\n";
      append_yaml(field, indent + 2, comment, out);
    } else if (field.children.empty()) {
      out += margin + field.name + ": []" + tail;
    } else {
      out += margin + field.name + ":\n";
      for (const FieldNode& element : field.children) {
        const size_t start = out.size();
        append_yaml(element, indent + 4, comment, out);
        out[start + static_cast<size_t>(indent) + 2] = '-';
      }
    }
  }
}

// Text that every YAML reader takes for text without quotes.
bool is_plain_text(std::string_view text) {
  const auto is_letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  const auto is_safe = [&](char c) {
    return is_letter(c) || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.' || c == '/' ||
           c == '+';
  };
  if (text.empty() || (!is_letter(text[0]) && text[0] != '/')) return false;
  if (!std::all_of(text.begin(), text.end(), is_safe)) return false;
  std::string lower(text);
  for (char& c : lower)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  constexpr std::string_view kWords[] = {"null", "true", "false", "yes", "no",
                                         "on",   "off",  "y",     "n"};
  return std::find(std::begin(kWords), std::end(kWords), lower) == std::end(kWords);
}

}  // namespace

FieldNode describe(const Config& config) {
  FieldNode root;
  Describer::fill(root, config);
  return root;
}

const FieldNode* find_field(const FieldNode& root, const std::string& path) {
  const FieldNode* node = &root;
  for (const std::string& part : split_path(path)) {
    if (node->type == FieldType::section_list) {
      const Parsed<int64_t> index = parse_int(part);
      if (index.value) {
        const bool exists =
            *index.value >= 0 && *index.value < static_cast<int64_t>(node->children.size());
        node = exists ? &node->children[static_cast<size_t>(*index.value)] : &node->prototype[0];
        continue;
      }
      node = &node->prototype[0];
    }
    node = child_named(*node, part);
    if (!node) return nullptr;
  }
  return node;
}

void for_each_leaf(const FieldNode& node, const std::function<void(const FieldNode&)>& visit,
                   bool prototypes) {
  if (node.is_leaf()) return visit(node);
  for (const FieldNode& child : node.children) for_each_leaf(child, visit, prototypes);
  if (prototypes)
    for (const FieldNode& child : node.prototype) for_each_leaf(child, visit, prototypes);
}

std::string to_yaml(const FieldNode& root,
                    const std::function<std::string(const FieldNode&)>& comment) {
  std::string out;
  append_yaml(root, 0, comment, out);
  return out;
}

std::string type_text(const FieldNode& node) {
  switch (node.type) {
    case FieldType::boolean:
      return "true or false";
    case FieldType::optional_boolean:
      return "true, false or null";
    case FieldType::integer:
      return node.range.accepts_null ? "whole number or null" : "whole number";
    case FieldType::auto_integer:
      return "whole number or auto";
    case FieldType::number:
      return "number";
    case FieldType::number_pair:
      return "two numbers";
    case FieldType::step_count:
      return "steps, or a percentage of train.steps";
    case FieldType::text:
      return "text";
    case FieldType::text_list:
      return "list of texts";
    case FieldType::section:
      return "section";
    case FieldType::section_list:
      return "list of sections";
    case FieldType::name:
      break;
  }
  std::string text;
  for (size_t i = 0; i < node.names.size(); ++i)
    text += (i == 0 ? "" : i + 1 == node.names.size() ? " or " : ", ") + node.names[i];
  return text;
}

std::string range_text(const Range& range) {
  const bool has_low = std::isfinite(range.low), has_high = std::isfinite(range.high);
  const auto number = [](double value) {
    return value == std::floor(value) && std::abs(value) < 1e18 ? fmt::format("{:.0f}", value)
                                                                : format_double(value);
  };
  if (!has_low) return {};
  if (has_high && !range.low_is_excluded)
    return fmt::format("{} to {}", number(range.low), number(range.high));
  const std::string low =
      fmt::format("{} {}", range.low_is_excluded ? "above" : "at least", number(range.low));
  return has_high ? fmt::format("{} and at most {}", low, number(range.high)) : low;
}

std::string suggest_key(const FieldNode& root, const std::string& section_path,
                        const std::string& key) {
  if (key == "<<") return "YAML merge keys are not supported; `extends: other.yaml` at the top is";
  if (key == "extends") return "extends stands at the top of a job file only";
  const FieldNode* section = section_path.empty() ? &root : find_field(root, section_path);
  if (!section) return {};
  if (section->type == FieldType::section_list) section = &section->prototype[0];

  if (key.find('.') != std::string::npos && find_field(root, key))
    return fmt::format("keys are nested: write '{}' under '{}'", key.substr(key.rfind('.') + 1),
                       key.substr(0, key.rfind('.')));
  if (section != &root && child_named(root, key))
    return fmt::format("'{}' is a section of its own; indent it less", key);
  const auto section_with = [&](const std::string& name) -> std::string {
    for (const FieldNode& top : root.children)
      if (&top != section && child_named(top, name))
        return fmt::format("'{}' exists under '{}'", name, top.path);
    return {};
  };
  if (std::string found = section_with(key); !found.empty()) return found;

  std::vector<std::string> siblings, all;
  for (const FieldNode& child : section->children) siblings.push_back(child.name);
  if (section == &root) siblings.push_back("extends");
  if (const auto near = closest_word(key, siblings))
    return fmt::format("did you mean '{}'?", *near);
  std::vector<std::string> foreign_names;
  for (const auto& [foreign, ours] : kForeignNames) foreign_names.emplace_back(foreign);
  if (const auto near = closest_word(key, foreign_names))
    for (const auto& [foreign, ours] : kForeignNames)
      if (foreign == *near) return fmt::format("did you mean '{}'?", ours);
  for (const FieldNode& top : root.children)
    for (const FieldNode& child : top.children) all.push_back(child.name);
  if (const auto near = closest_word(key, all)) return section_with(*near);
  return {};
}

std::string yaml_text(std::string_view text) {
  if (is_plain_text(text)) return std::string(text);
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    } else {
      out += c;
    }
  }
  return out + "\"";
}

}  // namespace dstrain
