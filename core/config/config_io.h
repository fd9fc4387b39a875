// The job file, from text to a Config and back.
//
// Layers, later ones win: built-in defaults, a preset or a Hugging Face folder (model.preset,
// model.from), the files named by `extends`, the job file, the command line. All problems of all
// layers are reported together as a ConfigProblems error (at most 20 are shown). Loading checks
// keys, types and ranges; rules across keys are in core/config/validate.h.
// Functions are pure but for reading the named files; they may be called from any thread.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/config/config.h"
#include "core/config/problems.h"

namespace dstrain {

// A value given on the command line.
struct Override {
  std::string key;     // dotted path; list elements as data.train[0].path or data.train.0.path
  std::string value;   // text as typed; lists in YAML flow form
  std::string origin;  // what was typed: "--set optimizer.lr=3e-4", "--lr 3e-4"
};

// Where a key got its value.
struct Origin {
  enum class Kind { default_value, preset, file, command_line };
  Kind kind = Kind::default_value;
  std::string text = "default";  // "default", "preset v2-lite", "job.yaml:14:3", "--lr 3e-4"
  Location location;             // for messages; empty unless the kind is file or command_line
};

struct LoadedConfig {
  Config config;
  std::map<std::string, Origin> origins;  // by dotted path; a key that is absent has its default
  SourceTexts sources;                    // texts that the locations point into

  const Origin& origin(const std::string& key) const;
  bool is_set(const std::string& key) const { return origins.count(key) > 0; }
  void set_origin(const std::string& key, Origin origin) { origins[key] = std::move(origin); }
  // YAML that loads back to `config`, with where each value came from as comments.
  std::string resolved_yaml() const;
};

// Loads the job file at `path` (none: defaults only) and applies the overrides. Without a file,
// run.name defaults to model.preset. Throws NotFoundError, PermissionError or StorageError if a
// file cannot be read, ConfigProblems otherwise.
LoadedConfig load_config(const std::optional<std::string>& path,
                         const std::vector<Override>& overrides = {});

// Overrides on top of a finished configuration, such as a checkpoint's stamp. A model.preset among
// them is noted but its values are not taken.
LoadedConfig apply_overrides(const Config& base, const std::vector<Override>& overrides);

// The problems of one command-line value by itself; empty if there are none.
Problems check_override(const Override& value);

// Parses the text of dump_config(), such as the stamp in a checkpoint. The text stands for itself:
// no preset, Hugging Face folder or `extends` is followed. `name` is the file name in messages.
Config parse_config_text(std::string_view text, const std::string& name);

// YAML with every key that loads back to the identical Config.
std::string dump_config(const Config& config);

// One line per key whose values differ: "optimizer.lr: 0.001 -> 0.0003". Empty if equal.
std::vector<std::string> diff_config(const Config& before, const Config& after);

// What one key means and where its value came from; a section lists its keys. Throws UsageError
// with a suggestion if there is no such key.
std::string explain(const LoadedConfig& loaded, const std::string& key);

// JSON Schema (draft-07) of the job file.
std::string config_schema();

}  // namespace dstrain
