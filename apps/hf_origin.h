// The Hugging Face folder that a run's weights came from, as far as an export needs it to give the folder
// back: every checkpoint that descends from an import carries it.
#pragma once

#include <optional>
#include <string>

#include "core/checkpoint/hf_types.h"
#include "core/checkpoint/manifest.h"

namespace dstrain {

struct HfOrigin {
  std::string folder;
  std::string config;  // text of its config.json
  HfTypes types;       // of its tensors
};

void put_hf_origin(const HfOrigin& origin, CheckpointMeta& meta);
// Nothing if the weights were made here. DataError, starting with `where`, if what is there is malformed.
std::optional<HfOrigin> get_hf_origin(const CheckpointMeta& meta, const std::string& where);

}  // namespace dstrain
