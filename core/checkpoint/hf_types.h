// The element types of a Hugging Face folder's tensors, and their text in a checkpoint's metadata, so that an
// export can give back the bits of what was imported.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "core/checkpoint/safetensors.h"

namespace dstrain {

// F16, BF16, F32 and F64: what parameters are read from and written as.
bool is_weight_type(SafetensorsType type);

// By Hugging Face's names of the tensors.
struct HfTypes {
  SafetensorsType usual = SafetensorsType::f32;
  std::map<std::string, SafetensorsType> others;  // tensors of another type

  SafetensorsType of(const std::string& name) const;
  bool operator==(const HfTypes&) const = default;
};

// "BF16", then a line for each other tensor: "F32 model.norm.weight".
std::string encode_hf_types(const HfTypes& types);
// DataError, starting with `where`, if the text is not of this form.
HfTypes parse_hf_types(std::string_view text, const std::string& where);

}  // namespace dstrain
