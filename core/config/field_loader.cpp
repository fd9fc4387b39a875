#include "core/config/field_loader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/config/scalar.h"
#include "core/config/suggest.h"

namespace dstrain {
namespace {

using Kind = YamlNode::Kind;

constexpr size_t kMaxListItems = 4096;

std::string kind_text(const YamlNode& node) {
  switch (node.kind) {
    case Kind::null:
      return "nothing";
    case Kind::list:
      return "a list";
    case Kind::map:
      return "a section";
    case Kind::element:
      return "an element";
    case Kind::scalar:
    case Kind::argument:
      break;
  }
  return quote(node.text);
}

bool has_text(const YamlNode& node) {
  return node.kind == Kind::scalar || node.kind == Kind::argument;
}

// Reads values into the members that a field list names; one object per layer.
class Loader {
 public:
  explicit Loader(LoadContext& context) : context_(context) {}

  template <FieldStruct S>
  void load(const YamlNode& node, const std::string& path, const Range& range, S& section);
  template <class T>
  void load_list(const YamlNode& node, const std::string& path, std::vector<T>& list);
  template <FieldStruct S>
  void load(const YamlNode& node, const std::string& path, const Range&, std::vector<S>& list) {
    load_list(node, path, list);
  }
  void load(const YamlNode& node, const std::string& path, const Range&,
            std::vector<std::string>& list) {
    load_list(node, path, list);
  }
  void load(const YamlNode& node, const std::string& path, const Range&, bool& value);
  void load(const YamlNode& node, const std::string& path, const Range&,
            std::optional<bool>& value);
  void load(const YamlNode& node, const std::string& path, const Range& range, int64_t& value);
  void load(const YamlNode& node, const std::string& path, const Range& range, AutoInt& value);
  void load(const YamlNode& node, const std::string& path, const Range& range, double& value);
  void load(const YamlNode& node, const std::string& path, const Range& range,
            std::pair<double, double>& value);
  void load(const YamlNode& node, const std::string& path, const Range&, StepCount& value);
  void load(const YamlNode& node, const std::string& path, const Range&, std::string& value);
  template <NamedEnum E>
  void load(const YamlNode& node, const std::string& path, const Range&, E& value);

 private:
  // Visits the fields of one struct with the entries of one map.
  template <FieldStruct S>
  struct Visitor {
    Loader& loader;
    const YamlNode& map;
    const std::string& path;
    std::vector<std::string> names;

    void operator()(const char* name, auto& member, const Range& range, const char*) {
      names.emplace_back(name);
      if (const YamlNode* value = map.find(name))
        loader.load(*value, join(path, name), range, member);
    }
  };

  // Finds required fields of a list element that have no value.
  struct RequiredVisitor {
    std::string missing;
    void operator()(const char* name, const std::string& member, const Range& range, const char*) {
      if (range.is_required && member.empty()) missing = name;
    }
    void operator()(const char*, const auto&, const Range&, const char*) {}
  };

  static std::string join(const std::string& path, const std::string& name) {
    return path.empty() ? name : path + "." + name;
  }

  void fail(const YamlNode& node, const std::string& path, const std::string& reason,
            std::string hint = "") {
    context_.problems.add(node.location, path + " " + reason, std::move(hint));
  }
  void note_origin(const YamlNode& node, const std::string& path);
  // Of the keys from `first` up to `last`, the text that follows all that begin with `first`.
  void forget_origins(const std::string& first, const std::string& last) {
    context_.origins.erase(context_.origins.lower_bound(first), context_.origins.lower_bound(last));
  }
  void refuse_unknown_keys(const YamlNode& map, const std::string& path,
                           const std::vector<std::string>& known);
  template <class T>
  std::optional<T> parse(const YamlNode& node, const std::string& path,
                         Parsed<T> (*parser)(std::string_view));
  bool check_range(const YamlNode& node, const std::string& path, const Range& range, double value);
  // The list or map that a command-line text stands for, kept in `storage`; other nodes are
  // themselves. Null after a problem.
  const YamlNode* as_structure(const YamlNode& node, const std::string& path,
                               std::optional<YamlNode>& storage);
  template <class T>
  void load_element(const YamlNode& node, const std::string& path, T& value);

  LoadContext& context_;
};

void Loader::note_origin(const YamlNode& node, const std::string& path) {
  context_.origins[path] = {context_.kind, context_.sources.describe(node.location), node.location};
}

void Loader::refuse_unknown_keys(const YamlNode& map, const std::string& path,
                                 const std::vector<std::string>& known) {
  std::optional<FieldNode> schema;
  for (const YamlEntry& entry : map.entries) {
    if (std::find(known.begin(), known.end(), entry.key) != known.end()) continue;
    std::string hint;
    if (context_.problems.wants_detail()) {
      if (!schema) schema = describe(Config{});
      hint = suggest_key(*schema, path, entry.key);
    }
    const std::string where = path.empty() ? "at the top level" : "in '" + path + "'";
    context_.problems.add(entry.location, fmt::format("unknown key {} {}", quote(entry.key), where),
                          std::move(hint));
  }
}

template <class T>
std::optional<T> Loader::parse(const YamlNode& node, const std::string& path,
                               Parsed<T> (*parser)(std::string_view)) {
  // The parsers name what they expect; a value that is no text is shown by its kind.
  if (!has_text(node)) {
    const std::string expected = parser("").reason;  // "expects a number, got ''"
    fail(node, path, expected.substr(0, expected.rfind(", got")) + ", got " + kind_text(node));
    return std::nullopt;
  }
  Parsed<T> parsed = parser(node.text);
  if (parsed.value && node.is_quoted) {
    const std::string expected = parser("").reason;
    fail(node, path, expected.substr(0, expected.rfind(", got")) + ", got text in quotes",
         "remove the quotes");
    return std::nullopt;
  }
  if (!parsed.value) fail(node, path, parsed.reason, parsed.hint);
  return parsed.value;
}

bool Loader::check_range(const YamlNode& node, const std::string& path, const Range& range,
                         double value) {
  if (range.contains(value)) return true;
  fail(node, path, fmt::format("must be {}, got {}", range_text(range), format_double(value)));
  return false;
}

const YamlNode* Loader::as_structure(const YamlNode& node, const std::string& path,
                                     std::optional<YamlNode>& storage) {
  if (node.kind != Kind::argument) return &node;
  Problems inner;
  SourceTexts scratch;
  storage = parse_yaml(scratch.add_file(path, node.text), node.text, inner);
  if (!storage || !inner.empty()) {
    const Problem& first = inner.list().front();
    fail(node, path, "cannot be read: " + first.message, first.hint);
    return nullptr;
  }
  // Everything inside points to the argument.
  const auto relocate = [&](auto& self, YamlNode& child) -> void {
    child.location = node.location;
    for (YamlNode& item : child.items) self(self, item);
    for (YamlEntry& entry : child.entries) {
      entry.location = node.location;
      self(self, entry.value);
    }
  };
  relocate(relocate, *storage);
  return &*storage;
}

template <FieldStruct S>
void Loader::load(const YamlNode& node, const std::string& path, const Range& range, S& section) {
  std::optional<YamlNode> storage;
  const YamlNode* map = as_structure(node, path, storage);
  if (!map) return;
  if (map->kind == Kind::null && (path.empty() || range.accepts_null)) {
    if (path.empty()) return;
    section = S{};
    forget_origins(path + ".", path + "/");
    return;
  }
  const std::string name = path.empty() ? "the job file" : path;
  if (map->kind == Kind::null)
    return fail(*map, name, "is empty", "give keys below it, or remove it");
  if (map->kind != Kind::map)
    return fail(*map, name, "expects keys with values, got " + kind_text(*map));
  Visitor<S> visitor{*this, *map, path, {}};
  S::fields(visitor, section);
  refuse_unknown_keys(*map, path, visitor.names);
}

template <class T>
void Loader::load_element(const YamlNode& node, const std::string& path, T& value) {
  load(node, path, any(), value);
  if constexpr (FieldStruct<T>) {
    RequiredVisitor required;
    T::fields(required, static_cast<const T&>(value));
    if (!required.missing.empty() && node.kind == Kind::map)
      fail(node, path, fmt::format("needs '{}'", required.missing));
  }
}

// A list replaces the one of lower layers; an element from the command line changes or appends one.
template <class T>
void Loader::load_list(const YamlNode& given, const std::string& path, std::vector<T>& list) {
  std::optional<YamlNode> storage;
  const YamlNode* node = as_structure(given, path, storage);
  if (!node) return;
  if (node->kind == Kind::element) {
    const int64_t size = static_cast<int64_t>(list.size());
    const YamlNode& value = node->items[0];
    if (node->index > size || node->index >= static_cast<int64_t>(kMaxListItems))
      return fail(*node, path,
                  fmt::format("has {} element{}; index {} is beyond its end", size,
                              size == 1 ? "" : "s", node->index),
                  fmt::format("{}[{}] would append one", path, size));
    if (node->index == size) list.emplace_back();
    // What the element requires may follow with the next argument; validate() looks again.
    return load(value, fmt::format("{}[{}]", path, node->index), any(),
                list[static_cast<size_t>(node->index)]);
  }
  if (node->kind != Kind::list) {
    const std::string example = FieldStruct<T> ? "[{path: ..., weight: 1.0}]" : "[a, b]";
    return fail(*node, path, "expects a list, got " + kind_text(*node), "write it as " + example);
  }
  if (node->items.size() > kMaxListItems)
    return fail(*node, path, fmt::format("has more than {} elements", kMaxListItems));
  list.clear();
  forget_origins(path + "[", path + "\\");
  for (size_t i = 0; i < node->items.size(); ++i) {
    list.emplace_back();
    load_element(node->items[i], fmt::format("{}[{}]", path, i), list.back());
  }
  note_origin(*node, path);
}

void Loader::load(const YamlNode& node, const std::string& path, const Range&, bool& value) {
  if (const auto parsed = parse(node, path, parse_bool)) {
    value = *parsed;
    note_origin(node, path);
  }
}

void Loader::load(const YamlNode& node, const std::string& path, const Range&,
                  std::optional<bool>& value) {
  if (node.kind == Kind::null || (node.kind == Kind::argument && node.text == "null")) {
    value.reset();
    return note_origin(node, path);
  }
  if (const auto parsed = parse(node, path, parse_bool)) {
    value = *parsed;
    note_origin(node, path);
  }
}

void Loader::load(const YamlNode& node, const std::string& path, const Range& range,
                  int64_t& value) {
  const bool is_null =
      node.kind == Kind::null || (node.kind == Kind::argument && node.text == "null");
  if (is_null && range.accepts_null) {
    value = 0;
    return note_origin(node, path);
  }
  const auto parsed = parse(node, path, parse_int);
  if (!parsed || !check_range(node, path, range, static_cast<double>(*parsed))) return;
  value = *parsed;
  note_origin(node, path);
}

void Loader::load(const YamlNode& node, const std::string& path, const Range& range,
                  AutoInt& value) {
  if (has_text(node) && node.text == "auto") {
    value = {};
    return note_origin(node, path);
  }
  if (!has_text(node) || !parse_int(node.text).value)
    return fail(node, path, "expects auto or a whole number, got " + kind_text(node));
  load(node, path, range, value.value);
}

void Loader::load(const YamlNode& node, const std::string& path, const Range& range,
                  double& value) {
  const auto parsed = parse(node, path, parse_double);
  if (!parsed || !check_range(node, path, range, *parsed)) return;
  value = *parsed;
  note_origin(node, path);
}

void Loader::load(const YamlNode& given, const std::string& path, const Range& range,
                  std::pair<double, double>& value) {
  std::optional<YamlNode> storage;
  const YamlNode* node = as_structure(given, path, storage);
  if (!node) return;
  if (node->kind != Kind::list || node->items.size() != 2)
    return fail(*node, path, "expects a list of two numbers", "write it as [0.9, 0.95]");
  load(node->items[0], path, range, value.first);
  load(node->items[1], path, range, value.second);
  note_origin(*node, path);
}

void Loader::load(const YamlNode& node, const std::string& path, const Range&, StepCount& value) {
  const std::string expected = "expects a number of steps or a percentage such as 5%, got ";
  if (!has_text(node)) return fail(node, path, expected + kind_text(node));
  std::string_view text = node.text;
  const bool is_percent = !text.empty() && text.back() == '%';
  if (is_percent) text.remove_suffix(1);
  const Parsed<double> parsed = parse_double(text);
  if (!parsed.value) return fail(node, path, expected + kind_text(node));
  const Range range = is_percent ? in_range(0, 100) : in_range(0, 9e15);
  if (!check_range(node, path, range, *parsed.value)) return;
  if (!is_percent && *parsed.value != std::floor(*parsed.value))
    return fail(node, path, expected + kind_text(node),
                *parsed.value < 1
                    ? fmt::format("write {:g}% for that share of train.steps", 100 * *parsed.value)
                    : "steps are whole");
  value = {*parsed.value, is_percent};
  note_origin(node, path);
}

void Loader::load(const YamlNode& node, const std::string& path, const Range&, std::string& value) {
  if (!has_text(node)) return fail(node, path, "expects text, got " + kind_text(node));
  const bool has_control = std::any_of(node.text.begin(), node.text.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7F;
  });
  if (has_control) return fail(node, path, "contains a control character or a line break");
  value = node.text;
  note_origin(node, path);
}

template <NamedEnum E>
void Loader::load(const YamlNode& node, const std::string& path, const Range&, E& value) {
  if (const auto known = has_text(node) ? enum_from_name<E>(node.text) : std::nullopt) {
    value = *known;
    return note_origin(node, path);
  }
  std::vector<std::string> names;
  std::string list;
  for (const auto& entry : kEnumNames<E>) names.emplace_back(entry.name);
  for (size_t i = 0; i < names.size(); ++i)
    list += (i == 0 ? "" : i + 1 == names.size() ? " or " : ", ") + names[i];
  // Names of three letters are all near to each other: cpu is no guess for gpu.
  const auto near = node.text.size() > 3 ? closest_word(node.text, names) : std::nullopt;
  fail(node, path, fmt::format("must be {}, got {}", list, kind_text(node)),
       near ? fmt::format("did you mean '{}'?", *near) : "");
}

}  // namespace

void load_layer(const YamlNode& layer, Config& config, LoadContext& context) {
  Loader(context).load(layer, "", any(), config);
}

}  // namespace dstrain
