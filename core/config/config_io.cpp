#include "core/config/config_io.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "core/base/file.h"
#include "core/config/field_loader.h"
#include "core/config/field_tree.h"
#include "core/config/hf_config.h"
#include "core/config/override_layer.h"
#include "core/config/presets.h"
#include "core/config/yaml_tree.h"

namespace dstrain {
namespace {

constexpr int kMaxExtends = 8;

// The file's bytes, at most one more than is allowed, so that a device or a huge file ends too. A
// job may come through a pipe, which core/base/file.h does not read.
std::string read_job_file(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw_errno("cannot open", path, errno);
  std::string text;
  char buffer[16384];
  while (static_cast<int64_t>(text.size()) <= kMaxYamlBytes) {
    const ssize_t n = ::read(fd, buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int error = errno;
      ::close(fd);
      if (error == EISDIR) throw ConfigError("'" + path + "' is a folder, not a job file");
      throw_errno("cannot read", path, error);
    }
    if (n == 0) break;
    text.append(buffer, static_cast<size_t>(n));
  }
  ::close(fd);
  return text;
}

// One layer of values that a person wrote.
struct Layer {
  YamlNode node;
  Origin::Kind kind;
};

// Takes `extends` out of a file's map.
std::optional<YamlEntry> take_extends(YamlNode& root) {
  for (size_t i = 0; i < root.entries.size(); ++i)
    if (root.entries[i].key == "extends") {
      YamlEntry entry = std::move(root.entries[i]);
      root.entries.erase(root.entries.begin() + static_cast<std::ptrdiff_t>(i));
      return entry;
    }
  return std::nullopt;
}

bool is_same_file(const std::string& a, const std::string& b) {
  std::error_code error;
  return a == b || std::filesystem::equivalent(a, b, error);
}

// Collects the layers of a job, lowest first, and loads them.
class JobLoader {
 public:
  // `base` lies below all layers.
  explicit JobLoader(Config base = {}) { loaded_.config = std::move(base); }

  // The file and everything it extends become layers; the innermost file is the lowest.
  void add_file(const std::string& path) {
    std::vector<Layer> files;
    std::vector<std::string> chain = {path};
    for (std::string current = path; !current.empty();) {
      std::optional<YamlNode> root = parse(read_job_file(current), current);
      if (!root) break;
      const std::optional<YamlEntry> extends = take_extends(*root);
      files.insert(files.begin(), {std::move(*root), Origin::Kind::file});
      current = extends ? next_file(*extends, chain) : "";
    }
    for (Layer& file : files) layers_.push_back(std::move(file));
  }

  // A text that stands for itself.
  void add_text(const std::string& text, const std::string& name) {
    if (std::optional<YamlNode> root = parse(text, name))
      layers_.push_back({std::move(*root), Origin::Kind::file});
  }

  void add_override(const Override& value) {
    Layer layer{override_layer(value, loaded_.sources, problems_), Origin::Kind::command_line};
    if (layer.node.kind == YamlNode::Kind::map) layers_.push_back(std::move(layer));
  }

  // Starts the model from model.preset or model.from, below all other layers.
  void load_model_source() {
    const YamlNode* preset = find_model_value("preset");
    const YamlNode* from = find_model_value("from");
    if (preset && from)
      return problems_.add(from->location, "model.from and model.preset both name a model",
                           "keep one");
    if (preset) {
      const std::optional<ModelConfig> model = find_preset(preset->text);
      if (!model)
        return problems_.add(preset->location,
                             "model.preset: there is no preset " + quote(preset->text),
                             suggest_preset(preset->text));
      start_from(*model, "preset " + preset->text);
    }
    if (from) {
      const std::string path = join_path(from->text, "config.json");
      start_from(parse_hf_config(read_small_file(path, kMaxHfConfigBytes), path), path);
    }
  }

  void load_layers() {
    for (const Layer& layer : layers_) {
      LoadContext context{loaded_.sources, problems_, loaded_.origins, layer.kind};
      load_layer(layer.node, loaded_.config, context);
    }
  }

  const Problems& problems() const { return problems_; }

  LoadedConfig finish() {
    problems_.throw_if_any(loaded_.sources);
    return std::move(loaded_);
  }

 private:
  std::optional<YamlNode> parse(const std::string& text, const std::string& name) {
    const int source = loaded_.sources.add_file(name, text);
    std::optional<YamlNode> root = parse_yaml(source, text, problems_);
    if (root && root->kind == YamlNode::Kind::null) {
      problems_.add({source, 0, 0, 1}, "the job file is empty",
                    "see configs/quickstart.yaml for one that runs");
      return std::nullopt;
    }
    return root;
  }

  // The path that `extends` names, relative to the file it stands in; empty after a problem.
  std::string next_file(const YamlEntry& extends, std::vector<std::string>& chain) {
    const Location& place = extends.value.location;
    if (extends.value.kind != YamlNode::Kind::scalar || extends.value.text.empty()) {
      problems_.add(place, "extends expects the path of another job file");
      return {};
    }
    const std::filesystem::path folder = std::filesystem::path(chain.back()).parent_path();
    const std::string path = (folder / extends.value.text).string();
    for (const std::string& earlier : chain)
      if (is_same_file(earlier, path)) {
        problems_.add(
            place, fmt::format("extends runs in a circle: {} is already being read", quote(path)));
        return {};
      }
    if (chain.size() > kMaxExtends) {
      problems_.add(place, fmt::format("more than {} files extend each other", kMaxExtends));
      return {};
    }
    if (::access(path.c_str(), R_OK) != 0) {
      problems_.add(place,
                    fmt::format("extends: cannot open {}: {}", quote(path), std::strerror(errno)),
                    "the path is relative to this file");
      return {};
    }
    chain.push_back(path);
    return path;
  }

  // The value of model.<key> in the highest layer that has one.
  const YamlNode* find_model_value(const std::string& key) const {
    for (auto layer = layers_.rbegin(); layer != layers_.rend(); ++layer)
      if (const YamlNode* model = layer->node.find("model"))
        if (const YamlNode* value = model->find(key)) return value->text.empty() ? nullptr : value;
    return nullptr;
  }

  void start_from(const ModelConfig& model, const std::string& origin) {
    const FieldNode defaults = describe(loaded_.config);
    loaded_.config.model = model;
    for_each_leaf(describe(loaded_.config), [&](const FieldNode& leaf) {
      if (leaf.value != find_field(defaults, leaf.path)->value)
        loaded_.set_origin(leaf.path, {Origin::Kind::preset, origin, {}});
    });
  }

  LoadedConfig loaded_;
  Problems problems_;
  std::vector<Layer> layers_;
};

}  // namespace

const Origin& LoadedConfig::origin(const std::string& key) const {
  static const Origin default_origin;
  const auto found = origins.find(key);
  return found == origins.end() ? default_origin : found->second;
}

std::string LoadedConfig::resolved_yaml() const {
  return to_yaml(describe(config), [&](const FieldNode& leaf) {
    const Origin& from = origin(leaf.path);
    return from.kind == Origin::Kind::default_value ? "" : from.text;
  });
}

LoadedConfig load_config(const std::optional<std::string>& path,
                         const std::vector<Override>& overrides) {
  JobLoader loader;
  if (path) loader.add_file(*path);
  for (const Override& value : overrides) loader.add_override(value);
  loader.load_model_source();
  loader.load_layers();
  LoadedConfig loaded = loader.finish();
  if (!path && loaded.config.run.name.empty() && !loaded.config.model.preset.empty()) {
    loaded.config.run.name = loaded.config.model.preset;
    loaded.set_origin("run.name",
                      {Origin::Kind::preset, "preset " + loaded.config.model.preset, {}});
  }
  return loaded;
}

LoadedConfig apply_overrides(const Config& base, const std::vector<Override>& overrides) {
  JobLoader loader(base);
  for (const Override& value : overrides) loader.add_override(value);
  loader.load_layers();
  return loader.finish();
}

Problems check_override(const Override& value) {
  JobLoader loader;
  loader.add_override(value);
  loader.load_model_source();
  loader.load_layers();
  return loader.problems();
}

Config parse_config_text(std::string_view text, const std::string& name) {
  JobLoader loader;
  loader.add_text(std::string(text), name);
  loader.load_layers();
  return loader.finish().config;
}

std::string dump_config(const Config& config) {
  return to_yaml(describe(config));
}

std::vector<std::string> diff_config(const Config& before, const Config& after) {
  std::map<std::string, std::string> old_values;
  for_each_leaf(describe(before),
                [&](const FieldNode& leaf) { old_values[leaf.path] = leaf.value; });
  std::vector<std::string> lines;
  for_each_leaf(describe(after), [&](const FieldNode& leaf) {
    const auto old_value = old_values.find(leaf.path);
    if (old_value == old_values.end()) {
      lines.push_back(fmt::format("{}: (absent) -> {}", leaf.path, leaf.value));
    } else {
      if (old_value->second != leaf.value)
        lines.push_back(fmt::format("{}: {} -> {}", leaf.path, old_value->second, leaf.value));
      old_values.erase(old_value);
    }
  });
  for (const auto& [path, value] : old_values)
    lines.push_back(fmt::format("{}: {} -> (absent)", path, value));
  return lines;
}

}  // namespace dstrain
