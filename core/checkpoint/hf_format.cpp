#include "core/checkpoint/hf_format.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>

#include "core/base/log.h"
#include "core/checkpoint/json_strict.h"

namespace dstrain {
namespace {

constexpr int64_t kMaxIndexBytes = 64 << 20;
constexpr int64_t kMaxShardBytes = 5'000'000'000;
constexpr const char* kIndexName = "model.safetensors.index.json";

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  return n;
}

bool strip_suffix(std::string& text, std::string_view suffix) {
  if (!text.ends_with(suffix)) return false;
  text.resize(text.size() - suffix.size());
  return true;
}

// One mapping under construction: a slice of a fused parameter.
HfTensor slice_of(const Parameter& p, std::string name, int64_t rows, std::vector<HfRows> pieces) {
  HfTensor map;
  map.name = std::move(name);
  map.parameter = p.spec.name;
  map.columns = p.spec.shape.back();
  map.shape = {rows, map.columns};
  map.pieces = std::move(pieces);
  return map;
}

// qkv_proj.weight [G, m + 2, Q, D] or qkv_proj.bias [G, m + 2, Q].
void add_qkv(const Parameter& p, const std::string& prefix, const std::string& kind,
             std::vector<HfTensor>& out) {
  const int64_t G = p.spec.shape[0], parts = p.spec.shape[1], Q = p.spec.shape[2], m = parts - 2;
  const bool bias = kind == ".bias";
  auto add = [&](const char* name, int64_t first, int64_t count) {
    std::vector<HfRows> pieces;
    for (int64_t g = 0; g < G; ++g)
      pieces.push_back({g * count * Q, (g * parts + first) * Q, count * Q});
    HfTensor map = slice_of(p, prefix + name + kind, G * count * Q, std::move(pieces));
    if (bias) {
      map.columns = 1;
      map.shape = {G * count * Q};
    }
    out.push_back(std::move(map));
  };
  add("q_proj", 0, m);
  add("k_proj", m, 1);
  add("v_proj", m + 1, 1);
}

void add_experts_gate_up(const Parameter& p, const std::string& prefix, std::vector<HfTensor>& out) {
  const int64_t E = p.spec.shape[0], I = p.spec.shape[2];
  for (int64_t e = 0; e < E; ++e) {
    const std::string expert = prefix + std::to_string(e);
    out.push_back(slice_of(p, expert + ".gate_proj.weight", I, {{0, 2 * e * I, I}}));
    out.push_back(slice_of(p, expert + ".up_proj.weight", I, {{0, (2 * e + 1) * I, I}}));
  }
}

void add_parameter(const Parameter& p, std::vector<HfTensor>& out) {
  std::string stem = p.spec.name;
  if (strip_suffix(stem, "experts.gate_up_proj")) return add_experts_gate_up(p, stem + "experts.", out);
  if (strip_suffix(stem, "experts.down_proj")) {
    const int64_t rows = p.spec.shape[1];
    for (int64_t e = 0; e < p.spec.shape[0]; ++e)
      out.push_back(slice_of(p, stem + "experts." + std::to_string(e) + ".down_proj.weight", rows,
                             {{0, e * rows, rows}}));
    return;
  }
  if (strip_suffix(stem, "qkv_proj.weight")) return add_qkv(p, stem, ".weight", out);
  if (strip_suffix(stem, "qkv_proj.bias")) return add_qkv(p, stem, ".bias", out);
  if (strip_suffix(stem, "gate_up_proj.weight")) {
    const int64_t I = p.spec.shape[1];
    out.push_back(slice_of(p, stem + "gate_proj.weight", I, {{0, 0, I}}));
    out.push_back(slice_of(p, stem + "up_proj.weight", I, {{0, I, I}}));
    return;
  }
  // The rest corresponds one to one; biases by head are flat, weights by head are matrices.
  const bool vector = p.spec.shape.size() == 1 || p.spec.name.ends_with(".bias");
  const int64_t columns = vector ? 1 : p.spec.shape.back(), rows = p.global_numel() / columns;
  HfTensor map;
  map.name = map.parameter = p.spec.name;
  map.columns = columns;
  map.shape = vector ? std::vector<int64_t>{rows} : std::vector<int64_t>{rows, columns};
  map.pieces = {{0, 0, rows}};
  out.push_back(std::move(map));
}

std::vector<std::string> files_of_index(const std::string& folder) {
  const std::string path = join_path(folder, kIndexName);
  const std::string text = read_small_file(path, kMaxIndexBytes);
  std::set<std::string> files;
  JsonReader json(text, path);
  auto skip_metadata = [&] {
    json.object([&](const std::string&) { json.skip_value(); });
  };
  json.object([&](const std::string& key) {
    if (key == "metadata") return skip_metadata();
    if (key != "weight_map") json.fail("unexpected key '" + key + "'");
    json.object([&](const std::string&) { files.insert(json.string()); });
  });
  json.end();
  for (const std::string& name : files)
    if (!is_plain_file_name(name))
      throw DataError(path + ": " + printable_name(name) + " is not a plain file name of this folder");
  if (files.empty()) throw DataError(path + ": names no weight file");
  return {files.begin(), files.end()};
}

// Published files carry these; training makes them itself or does without. Of blocks beyond the
// last one only prediction modules: fewer blocks would be another model.
bool may_be_ignored(const std::string& name, const ModelConfig& model, const HfWeights& weights) {
  if (name.ends_with("rotary_emb.inv_freq")) return true;
  if (model.tie_word_embeddings && name == "lm_head.weight") return true;
  const std::string prefix = "model.layers.";
  if (!name.starts_with(prefix)) return false;
  int64_t layer = -1;
  const char* const end =
      std::from_chars(name.data() + prefix.size(), name.data() + name.size(), layer).ptr;
  if (layer < 0) return false;
  const int64_t last = model.num_hidden_layers + model.num_nextn_predict_layers;
  const bool shared = name.ends_with(".embed_tokens.weight") || name.ends_with("shared_head.head.weight");
  if (layer < last) return layer >= model.num_hidden_layers && shared;
  return weights.contains(std::string(name.data(), end) + ".eh_proj.weight");
}

}  // namespace

std::vector<HfTensor> hf_tensors(const ModelConfig&, const ParameterSet& parameters) {
  std::vector<HfTensor> out;
  for (const Parameter& p : parameters.all()) add_parameter(p, out);
  return out;
}

HfWeights::HfWeights(const std::string& folder) : folder_(folder) {
  if (path_exists(join_path(folder, kIndexName))) {
    for (const std::string& name : files_of_index(folder)) files_.emplace_back(join_path(folder, name));
    return;
  }
  files_.emplace_back(join_path(folder, "model.safetensors"));
}

bool HfWeights::contains(const std::string& name) const {
  return std::any_of(files_.begin(), files_.end(), [&](const auto& f) { return f.find(name); });
}

HfWeights::Place HfWeights::at(const std::string& name) const {
  for (const SafetensorsReader& file : files_)
    if (const SafetensorsEntry* entry = file.find(name)) return {&file, entry};
  throw DataError(folder_ + ": the weights lack tensor '" + name +
                  "' that config.json asks for; is the download complete?");
}

std::vector<std::string> HfWeights::names() const {
  std::vector<std::string> out;
  for (const SafetensorsReader& file : files_)
    for (const SafetensorsEntry& entry : file.tensors()) out.push_back(entry.name);
  return out;
}

namespace {

void check_names(const std::string& folder, const HfWeights& weights, const ModelConfig& model,
                 const std::vector<HfTensor>& maps) {
  std::set<std::string> known;
  for (const HfTensor& map : maps) known.insert(map.name);
  for (const std::string& name : weights.names())
    if (!known.contains(name) && !may_be_ignored(name, model, weights))
      throw DataError(folder + ": tensor '" + name + "' has no place in the model that config.json " +
                      "describes; training without it would be another model");
}

// transformers ties them, too.
void warn_of_own_head(const std::string& folder, const HfWeights& weights,
                      const ModelConfig& model) {
  const std::string head = "lm_head.weight", table = "model.embed_tokens.weight";
  if (!model.tie_word_embeddings || !weights.contains(head)) return;
  const HfWeights::Place a = weights.at(head), b = weights.at(table);
  bool is_copy = a.entry->type == b.entry->type && a.entry->shape == b.entry->shape;
  if (is_copy) {
    std::vector<char> head_bytes(static_cast<size_t>(a.entry->bytes)),
        table_bytes(head_bytes.size());
    a.file->read(*a.entry, head_bytes.data());
    b.file->read(*b.entry, table_bytes.data());
    is_copy = head_bytes == table_bytes;
  }
  if (!is_copy)
    log_warning(
        "{}: '{}' is left out, although it differs from '{}': config.json says that they are one "
        "(tie_word_embeddings)",
        folder, head, table);
}

// `raw` holds F64.
void warn_if_rounded(const std::string& name, const std::vector<char>& raw,
                     const std::vector<float>& values) {
  int64_t rounded = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    double stored = 0;
    std::memcpy(&stored, raw.data() + i * sizeof stored, sizeof stored);
    rounded += !std::isnan(stored) && stored != static_cast<double>(values[i]);
  }
  if (rounded > 0)
    log_warning("tensor '{}' is F64 and {} of its {} values had to be rounded to F32: an export will not give "
                "back their bits",
                name, rounded, values.size());
}

std::vector<float> read_tensor_as_f32(const HfWeights::Place& place, const HfTensor& map) {
  const SafetensorsEntry& entry = *place.entry;
  const int64_t count = product(map.shape);
  if (entry.shape != map.shape)
    throw DataError(fmt::format(
        "{}: tensor '{}' has another shape than config.json says ({} instead of {})",
        place.file->path(), map.name, entry.shape, map.shape));
  if (!is_weight_type(entry.type))
    throw DataError(place.file->path() + ": tensor '" + map.name + "' is " +
                    safetensors_type_name(entry.type) + "; weights are read from F16, BF16, F32 and F64");
  std::vector<char> raw(static_cast<size_t>(entry.bytes));
  std::vector<float> values(static_cast<size_t>(count));
  place.file->read(entry, raw.data());
  convert_to_f32(entry.type, raw.data(), count, values.data());
  if (entry.type == SafetensorsType::f64) warn_if_rounded(map.name, raw, values);
  return values;
}

// The one of most elements is the usual one.
HfTypes types_of(const HfWeights& weights, const std::vector<HfTensor>& maps) {
  std::map<SafetensorsType, int64_t> elements;
  for (const HfTensor& map : maps) elements[weights.at(map.name).entry->type] += product(map.shape);
  HfTypes types;
  types.usual = std::max_element(elements.begin(), elements.end(), [](const auto& a, const auto& b) {
                  return a.second < b.second;
                })->first;
  for (const HfTensor& map : maps) {
    const SafetensorsType type = weights.at(map.name).entry->type;
    if (type != types.usual) types.others[map.name] = type;
  }
  return types;
}

}  // namespace

HfTypes uniform_hf_types(SafetensorsType type, const ModelConfig& model,
                         const ParameterSet& parameters) {
  HfTypes types;
  types.usual = type;
  if (type == SafetensorsType::f32) return types;
  for (const HfTensor& map : hf_tensors(model, parameters))
    if (map.name.ends_with("e_score_correction_bias")) types.others[map.name] = SafetensorsType::f32;
  return types;
}

HfTypes read_hf_weights(
    const std::string& folder, const ModelConfig& model, const ParameterSet& parameters,
    const std::function<void(const std::string&, const std::vector<float>&)>& store) {
  const HfWeights weights(folder);
  const std::vector<HfTensor> maps = hf_tensors(model, parameters);
  check_names(folder, weights, model, maps);
  warn_of_own_head(folder, weights, model);
  std::vector<float> values;
  for (size_t i = 0; i < maps.size(); ++i) {
    const HfTensor& map = maps[i];
    const std::vector<float> part = read_tensor_as_f32(weights.at(map.name), map);
    const bool first = i == 0 || maps[i - 1].parameter != map.parameter;
    const bool last = i + 1 == maps.size() || maps[i + 1].parameter != map.parameter;
    if (first) {
      int64_t total = 0;
      for (size_t j = i; j < maps.size() && maps[j].parameter == map.parameter; ++j)
        total += product(maps[j].shape);
      values.assign(static_cast<size_t>(total), 0.0f);
    }
    copy_from_hf(map, part.data(), values.data());
    if (last) store(map.parameter, values);
  }
  return types_of(weights, maps);
}

namespace {

void append_as(SafetensorsWriter& writer, SafetensorsType type, const std::string& name,
               const std::vector<float>& values) {
  std::vector<char> raw(values.size() * static_cast<size_t>(safetensors_type_bytes(type)));
  if (!convert_from_f32(type, values.data(), std::ssize(values), raw.data()))
    throw DataError("tensor '" + name + "' holds values that " + safetensors_type_name(type) +
                    " cannot represent; export with --dtype bf16 or --dtype fp32");
  writer.append(raw.data(), std::ssize(raw));
}

struct Shard {
  std::vector<const HfTensor*> tensors;
  int64_t bytes = 0;
};

std::vector<Shard> split_into_shards(const std::vector<HfTensor>& maps, const HfTypes& types) {
  std::vector<Shard> shards(1);
  for (const HfTensor& map : maps) {
    const int64_t bytes = product(map.shape) * safetensors_type_bytes(types.of(map.name));
    if (!shards.back().tensors.empty() && shards.back().bytes + bytes > kMaxShardBytes)
      shards.emplace_back();
    shards.back().tensors.push_back(&map);
    shards.back().bytes += bytes;
  }
  // Larger element types first, so that every tensor is aligned.
  for (Shard& shard : shards)
    std::stable_sort(shard.tensors.begin(), shard.tensors.end(), [&](const auto* a, const auto* b) {
      return safetensors_type_bytes(types.of(a->name)) > safetensors_type_bytes(types.of(b->name));
    });
  return shards;
}

}  // namespace

void write_hf_weights(const std::string& folder, const ModelConfig& model,
                      const ParameterSet& parameters, const HfTypes& types,
                      const std::function<std::vector<float>(const std::string&)>& load) {
  const std::vector<HfTensor> maps = hf_tensors(model, parameters);
  const std::vector<Shard> shards = split_into_shards(maps, types);
  std::string index;
  int64_t total_bytes = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    char name[64] = "model.safetensors";
    if (shards.size() > 1)
      std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
    std::vector<SafetensorsSpec> specs;
    for (const HfTensor* map : shards[i].tensors) {
      specs.push_back({map->name, types.of(map->name), map->shape});
      index += (index.empty() ? "" : ",\n") + ("    " + json_quote(map->name)) + ": " + json_quote(name);
    }
    SafetensorsWriter writer(File::create_new(join_path(folder, name)), std::move(specs),
                             {{"format", "pt"}});
    std::string loaded;
    std::vector<float> values, part;
    for (const HfTensor* map : shards[i].tensors) {
      if (loaded != map->parameter) values = load(loaded = map->parameter);
      part.resize(static_cast<size_t>(product(map->shape)));
      copy_to_hf(*map, values.data(), part.data());
      append_as(writer, types.of(map->name), map->name, part);
    }
    writer.finish();
    total_bytes += shards[i].bytes;
  }
  if (shards.size() > 1)
    write_file_atomic(join_path(folder, kIndexName),
                      "{\n  \"metadata\": {\"total_size\": " + std::to_string(total_bytes) +
                          "},\n  \"weight_map\": {\n" + index + "\n  }\n}\n");
}

namespace {

std::vector<std::filesystem::path> model_files(const std::string& folder) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const bool weights = name.starts_with("model") && name.ends_with(".safetensors");
    if (weights || name == "config.json" || name == kIndexName) files.push_back(entry.path());
  }
  return files;
}

}  // namespace

bool holds_hf_model(const std::string& folder) { return !model_files(folder).empty(); }

void remove_hf_model(const std::string& folder) {
  for (const std::filesystem::path& file : model_files(folder)) std::filesystem::remove(file);
}

}  // namespace dstrain
