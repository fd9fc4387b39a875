// What a person or an editor asks about the job file: explain one key, or the whole schema.
#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "core/config/config_io.h"
#include "core/config/field_tree.h"
#include "core/config/presets.h"
#include "core/config/suggest.h"

namespace dstrain {
namespace {

using Json = nlohmann::ordered_json;

std::string explain_leaf(const LoadedConfig& loaded, const FieldNode& field,
                         const std::string& key) {
  const FieldNode defaults = describe(Config{});
  const FieldNode* default_field = find_field(defaults, field.path);
  std::string text = key + "\n";
  const auto line = [&](const char* title, const std::string& value) {
    if (!value.empty()) text += fmt::format("  {:<9} {}\n", title, value);
  };
  line("value:", field.value);
  line("default:",
       field.range.is_required ? "none: a training run needs a value" : default_field->value);
  line("type:", type_text(field));
  line("range:", range_text(field.range));
  line("meaning:", field.meaning);
  line("set by:", loaded.origin(field.path).text);
  if (field.path == "model.preset")
    for (const Preset& preset : presets())
      line("", fmt::format("{:<15} {}", preset.name, preset.description));
  return text;
}

std::string explain_section(const FieldNode& section, const std::string& key) {
  std::string text = key.empty() ? "" : fmt::format("{}: {}\n", key, section.meaning);
  const FieldNode& listed =
      section.type == FieldType::section_list ? section.prototype[0] : section;
  if (section.type == FieldType::section_list)
    text += fmt::format("a list, of {} here; each element has\n", section.children.size());
  for (const FieldNode& child : listed.children)
    text += fmt::format("  {:<32} {:<18} {}\n", (key.empty() ? "" : key + ".") + child.name,
                        child.value, child.meaning);
  return text;
}

[[noreturn]] void fail_unknown(const FieldNode& root, const std::string& key) {
  std::vector<std::string> paths;
  for_each_leaf(
      root, [&](const FieldNode& leaf) { paths.push_back(leaf.path); }, /*prototypes=*/true);
  for (const FieldNode& top : root.children) paths.push_back(top.path);
  std::string hint;
  for (const std::string& path : paths) {
    const bool is_tail = path.size() > key.size() + 1 && path.ends_with("." + key);
    if (is_tail) hint += (hint.empty() ? "did you mean '" : " or '") + path + "'";
  }
  if (!hint.empty()) hint += "?";
  const size_t dot = key.rfind('.');
  if (hint.empty() && dot != std::string::npos)
    hint = suggest_key(root, key.substr(0, dot), key.substr(dot + 1));
  if (hint.empty())
    if (const auto near = closest_word(key, paths)) hint = fmt::format("did you mean '{}'?", *near);
  if (hint.empty()) hint = suggest_key(root, "", key);
  throw UsageError(
      fmt::format("there is no key {}{}", quote(key),
                  hint.empty() ? "; 'config explain' lists the sections" : "\nhint: " + hint));
}

void add_bounds(const Range& range, Json& schema) {
  const auto bound = [](double value) -> Json {
    if (value == std::floor(value)) return static_cast<int64_t>(value);
    return value;
  };
  if (std::isfinite(range.low))
    schema[range.low_is_excluded ? "exclusiveMinimum" : "minimum"] = bound(range.low);
  if (std::isfinite(range.high)) schema["maximum"] = bound(range.high);
}

Json schema_of(const FieldNode& node) {
  Json schema = Json::object();
  if (!node.meaning.empty()) schema["description"] = node.meaning;
  switch (node.type) {
    case FieldType::boolean:
      schema["type"] = "boolean";
      break;
    case FieldType::optional_boolean:
      schema["type"] = {"boolean", "null"};
      break;
    case FieldType::integer:
      if (node.range.accepts_null)
        schema["type"] = {"integer", "null"};
      else
        schema["type"] = "integer";
      add_bounds(node.range, schema);
      break;
    case FieldType::auto_integer: {
      Json count = {{"type", "integer"}};
      add_bounds(node.range, count);
      schema["anyOf"] = {{{"const", "auto"}}, count};
      break;
    }
    case FieldType::number:
      schema["type"] = "number";
      add_bounds(node.range, schema);
      break;
    case FieldType::number_pair: {
      Json item = {{"type", "number"}};
      add_bounds(node.range, item);
      schema["type"] = "array";
      schema["items"] = item;
      schema["minItems"] = 2;
      schema["maxItems"] = 2;
      break;
    }
    case FieldType::step_count:
      schema["anyOf"] = {{{"type", "integer"}, {"minimum", 0}},
                         {{"type", "string"}, {"pattern", "^[0-9]+(\\.[0-9]+)?%$"}}};
      break;
    case FieldType::text:
      schema["type"] = "string";
      break;
    case FieldType::text_list:
      schema["type"] = "array";
      schema["items"] = {{"type", "string"}};
      break;
    case FieldType::name:
      schema["enum"] = node.names;
      break;
    case FieldType::section: {
      schema["type"] = node.range.accepts_null ? Json({"object", "null"}) : Json("object");
      schema["additionalProperties"] = false;
      Json properties = Json::object();
      for (const FieldNode& child : node.children) properties[child.name] = schema_of(child);
      schema["properties"] = std::move(properties);
      break;
    }
    case FieldType::section_list: {
      Json item = schema_of(node.prototype[0]);
      for (const FieldNode& child : node.prototype[0].children)
        if (child.range.is_required) item["required"].push_back(child.name);
      schema["type"] = "array";
      schema["items"] = std::move(item);
      break;
    }
  }
  return schema;
}

}  // namespace

std::string explain(const LoadedConfig& loaded, const std::string& key) {
  const FieldNode root = describe(loaded.config);
  if (key.empty()) return explain_section(root, "");
  const FieldNode* field = find_field(root, key);
  if (!field) fail_unknown(root, key);
  return field->is_leaf() ? explain_leaf(loaded, *field, key) : explain_section(*field, key);
}

std::string config_schema() {
  Json schema = {{"$schema", "http://json-schema.org/draft-07/schema#"},
                 {"title", "deepseek-train job file"}};
  schema.update(schema_of(describe(Config{})));
  schema["properties"]["extends"] = {
      {"description", "another job file whose values this one overrides; relative to this file"},
      {"type", "string"}};
  return schema.dump(2) + "\n";
}

}  // namespace dstrain
