#include "apps/next_commands.h"

#include <fmt/format.h>

#include "apps/assemble.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/config/hf_config.h"

namespace dstrain {
namespace {

// As a shell reads it back.
std::string shell_word(const std::string& text) {
  constexpr const char* kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./:,@%";
  if (!text.empty() && text.find_first_not_of(kPlain) == std::string::npos) return text;
  std::string quoted = "'";
  for (const char c : text) c == '\'' ? void(quoted += "'\\''") : void(quoted += c);
  return quoted + "'";
}

bool has_hf_family(const ModelConfig& model) {
  try {
    hf_config_text(model, {});
    return true;
  } catch (const ConfigError&) {
    return false;
  }
}

}  // namespace

std::vector<NextCommand> next_commands(const Config& config, bool is_finished) {
  const RunPaths paths(config);
  const std::string run = shell_word(paths.folder);
  if (!is_finished)
    return {{"go on",
             fmt::format("deepseek-train --config {} --resume latest", shell_word(paths.config))}};
  std::vector<NextCommand> next;
  if (!config.data.tokenizer.empty())
    next.push_back(
        {"write text",
         fmt::format("deepseek-train generate --run {} --prompt 'In the beginning'", run)});
  if (has_hf_family(config.model))
    next.push_back(
        {"give it to Hugging Face", fmt::format("deepseek-train export {} --output {}", run,
                                                shell_word(join_path(paths.folder, "hf")))});
  return next;
}

}  // namespace dstrain
