#include "core/checkpoint/hf_types.h"

#include <algorithm>

#include "core/base/error.h"
#include "core/checkpoint/json_strict.h"

namespace dstrain {

bool is_weight_type(SafetensorsType type) {
  return type == SafetensorsType::f16 || type == SafetensorsType::bf16 ||
         type == SafetensorsType::f32 || type == SafetensorsType::f64;
}

SafetensorsType HfTypes::of(const std::string& name) const {
  const auto at = others.find(name);
  return at == others.end() ? usual : at->second;
}

std::string encode_hf_types(const HfTypes& types) {
  std::string text = safetensors_type_name(types.usual);
  for (const auto& [name, type] : types.others)
    text += std::string("\n") + safetensors_type_name(type) + " " + name;
  return text;
}

HfTypes parse_hf_types(std::string_view text, const std::string& where) {
  const auto parse_type = [&](std::string_view name) {
    const std::optional<SafetensorsType> type = parse_safetensors_type(name);
    if (!type || !is_weight_type(*type))
      throw DataError(where + ": " + printable_name(name) + " is no type of weights");
    return *type;
  };
  HfTypes types;
  size_t end = std::min(text.find('\n'), text.size());
  types.usual = parse_type(text.substr(0, end));
  while (end < text.size()) {
    text.remove_prefix(end + 1);
    end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    const size_t space = line.find(' ');
    if (space == line.npos)
      throw DataError(where + ": " + printable_name(line) + " is not a type and a tensor's name");
    types.others[std::string(line.substr(space + 1))] = parse_type(line.substr(0, space));
  }
  return types;
}

}  // namespace dstrain
