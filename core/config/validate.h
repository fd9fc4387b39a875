// Rules across the keys of a job, checked after each field's own range. All broken rules are
// reported together, each at the line where its key was set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/config/config_io.h"

namespace dstrain {

// What the configuration is for. Data, a run name and the like are needed for training only.
enum class Purpose {
  inspect,  // config show, --dry-run, eval of a stamp
  train,
};

// Throws ConfigProblems with every broken rule.
void validate(const LoadedConfig& loaded, Purpose purpose);
// The same for a bare model, such as one read from a Hugging Face folder; `name` is its file.
void validate_model(const ModelConfig& model, const std::string& name);

// Legal choices that are probably not meant, one sentence each.
std::vector<std::string> config_warnings(const Config& config);

// Ranks that see different data, before any has started: of planned_mesh() in layout.h.
int64_t data_parallel_ranks(const Config& config);

// Whether a name can be a folder's: letters, digits, '.', '_', '-', '+' and spaces inside; it
// neither starts with '-' or '.', nor contains '/'.
bool is_safe_name(const std::string& name);

}  // namespace dstrain
