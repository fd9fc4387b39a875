#include "apps/hf_origin.h"

namespace dstrain {
namespace {

constexpr const char* kFolderKey = "imported_from";
constexpr const char* kConfigKey = "hf_config";
constexpr const char* kTypesKey = "hf_types";

}  // namespace

void put_hf_origin(const HfOrigin& origin, CheckpointMeta& meta) {
  meta.program[kFolderKey] = origin.folder;
  meta.program[kConfigKey] = origin.config;
  meta.program[kTypesKey] = encode_hf_types(origin.types);
}

std::optional<HfOrigin> get_hf_origin(const CheckpointMeta& meta, const std::string& where) {
  const auto text = [&](const char* key) {
    const auto at = meta.program.find(key);
    return at == meta.program.end() ? std::string() : at->second;
  };
  if (text(kConfigKey).empty() || text(kTypesKey).empty()) return std::nullopt;
  return HfOrigin{text(kFolderKey), text(kConfigKey),
                  parse_hf_types(text(kTypesKey), where + ": " + kTypesKey)};
}

}  // namespace dstrain
