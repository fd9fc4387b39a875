// tokenizer.json to TokenizerSpec and back.
#pragma once

#include <string>
#include <string_view>

#include "core/data/tokenizer_spec.h"

namespace dstrain {

// Throws DataError that names `name`, the JSON path and the reason for anything damaged or not
// supported. The result is consistent: ids unique and in range, merges between known tokens.
TokenizerSpec parse_tokenizer_json(std::string_view json, const std::string& name);

// The form that Hugging Face tokenizers loads.
std::string write_tokenizer_json(const TokenizerSpec& spec);

}  // namespace dstrain
