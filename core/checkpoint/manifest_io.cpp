// Manifests and shard descriptions as JSON. Encoding checks the rules that parsing checks, so that
// what was written can be read.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/checkpoint/json_strict.h"
#include "core/checkpoint/manifest.h"
#include "core/checkpoint/safetensors.h"

namespace dstrain {
namespace {

constexpr std::string_view kFormat = "deepseek-train checkpoint";
constexpr std::string_view kSealStart = "  \"xxh3\": \"", kSealEnd = "\"\n}\n";
constexpr size_t kSealBytes = kSealStart.size() + 32 + kSealEnd.size();

std::string encode_numbers(const std::vector<int64_t>& numbers) {
  return fmt::format("[{}]", fmt::join(numbers, ","));
}

std::string encode_strings(const std::map<std::string, std::string>& strings) {
  std::string out;
  for (const auto& [key, value] : strings)
    out += fmt::format("{}{}: {}", out.empty() ? "" : ", ", json_quote(key), json_quote(value));
  return "{" + out + "}";
}

// Doubles are strings: JSON has neither infinity nor NaN, and the digits must give back all bits.
std::string encode_values(const std::map<std::string, double>& values) {
  std::map<std::string, std::string> texts;
  for (const auto& [key, value] : values) texts[key] = fmt::format("{}", value);
  return encode_strings(texts);
}

std::string encode_counters(const std::map<std::string, int64_t>& counters) {
  std::string out;
  for (const auto& [key, value] : counters)
    out += fmt::format("{}{}: {}", out.empty() ? "" : ", ", json_quote(key), value);
  return "{" + out + "}";
}

std::string encode_file(const ManifestFile& file) {
  return fmt::format(R"({{"name": {}, "bytes": {}, "xxh3": "{}"}})", json_quote(file.name),
                     file.bytes, to_hex(file.hash));
}

std::string encode_tensor(const ManifestTensor& tensor) {
  std::string slices;
  for (const ManifestSlice& slice : tensor.slices)
    slices +=
        fmt::format(R"({}{{"file": {}, "offset": {}, "extent": {}, "xxh3": "{}"}})",
                    slices.empty() ? "" : ", ", json_quote(slice.file),
                    encode_numbers(slice.offset), encode_numbers(slice.extent), to_hex(slice.hash));
  return fmt::format(R"({{"name": {}, "dtype": "{}", "shape": {}, "slices": [{}]}})",
                     json_quote(tensor.name),
                     safetensors_type_name(to_safetensors_type(tensor.dtype)),
                     encode_numbers(tensor.shape), slices);
}

// One item a line.
template <class Items, class Encode>
std::string encode_list(const Items& items, Encode encode) {
  std::string out;
  for (const auto& item : items) out += (out.empty() ? "\n    " : ",\n    ") + encode(item);
  return "[" + out + "]";
}

std::string encode_fields(const Manifest& manifest) {
  const CheckpointMeta& meta = manifest.meta;
  const std::pair<const char*, std::string> fields[] = {
      {"format", json_quote(kFormat)},
      {"version", std::to_string(kManifestVersion)},
      {"created", json_quote(manifest.created)},
      {"step", std::to_string(meta.step)},
      {"seed", std::to_string(meta.seed)},
      {"samples_consumed", std::to_string(meta.samples_consumed)},
      {"skipped_samples", encode_numbers(meta.skipped_samples)},
      {"counters", encode_counters(meta.counters)},
      {"values", encode_values(meta.values)},
      {"fingerprints", encode_strings(meta.fingerprints)},
      {"program", encode_strings(meta.program)},
      {"layout", json_quote(meta.layout)},
      {"config", json_quote(meta.config_yaml)},
      {"files", encode_list(manifest.files, encode_file)},
      {"tensors", encode_list(manifest.tensors, encode_tensor)},
  };
  std::string out = "{\n";
  for (const auto& [key, value] : fields) out += fmt::format("  \"{}\": {},\n", key, value);
  return out;
}

std::vector<int64_t> read_dims(JsonReader& json) {
  std::vector<int64_t> numbers;
  json.array([&] {
    if (numbers.size() == static_cast<size_t>(Tensor::kMaxDims))
      json.fail(fmt::format("more than {} dims", Tensor::kMaxDims));
    numbers.push_back(json.unsigned_integer());
  });
  return numbers;
}

std::map<std::string, std::string> read_strings(JsonReader& json) {
  std::map<std::string, std::string> strings;
  json.object([&](const std::string& key) { strings[key] = json.string(); });
  return strings;
}

std::map<std::string, double> read_values(JsonReader& json) {
  std::map<std::string, double> values;
  json.object([&](const std::string& key) {
    const std::string digits = json.string();
    double value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size())
      json.fail(fmt::format("{} is no number", printable_name(digits)));
    values[key] = value;
  });
  return values;
}

template <class Hash>
Hash read_hash(JsonReader& json, std::optional<Hash> (*parse)(std::string_view)) {
  const std::string hex = json.string();
  const auto hash = parse(hex);
  if (!hash)
    json.fail(fmt::format("{} is no XXH3 hash in lower-case hexadecimal", printable_name(hex)));
  return *hash;
}

// Nothing outside the checkpoint's folder may ever be opened.
std::string read_file_name(JsonReader& json) {
  const std::string name = json.string();
  if (!is_plain_file_name(name) || !name.ends_with(".safetensors"))
    json.fail(fmt::format("{} is no plain name of a .safetensors file", printable_name(name)));
  return name;
}

ManifestFile read_file(JsonReader& json) {
  ManifestFile file;
  json.fields({{"name", [&] { file.name = read_file_name(json); }},
               {"bytes", [&] { file.bytes = json.unsigned_integer(); }},
               {"xxh3", [&] { file.hash = read_hash(json, parse_hash128); }}});
  return file;
}

ManifestSlice read_slice(JsonReader& json) {
  ManifestSlice slice;
  json.fields({{"file", [&] { slice.file = read_file_name(json); }},
               {"offset", [&] { slice.offset = read_dims(json); }},
               {"extent", [&] { slice.extent = read_dims(json); }},
               {"xxh3", [&] { slice.hash = read_hash(json, parse_hash64); }}});
  return slice;
}

DType read_dtype(JsonReader& json) {
  const std::string name = json.string();
  const auto type = parse_safetensors_type(name);
  const auto dtype = type ? to_dtype(*type) : std::nullopt;
  if (!dtype) json.fail(fmt::format("the dtype {} is unknown", printable_name(name)));
  return *dtype;
}

ManifestTensor read_tensor(JsonReader& json) {
  ManifestTensor tensor;
  json.fields(
      {{"name", [&] { tensor.name = json.string(); }},
       {"dtype", [&] { tensor.dtype = read_dtype(json); }},
       {"shape", [&] { tensor.shape = read_dims(json); }},
       {"slices", [&] { json.array([&] { tensor.slices.push_back(read_slice(json)); }); }}});
  if (tensor.name.empty()) json.fail("a tensor has an empty name");
  return tensor;
}

// Items must be sorted by name; so no name occurs twice.
template <class Item>
void read_sorted(JsonReader& json, std::vector<Item>& items, Item (*read)(JsonReader&)) {
  json.array([&] {
    Item item = read(json);
    if (!items.empty() && items.back().name >= item.name)
      json.fail(fmt::format("{} occurs twice or out of order", printable_name(item.name)));
    items.push_back(std::move(item));
  });
}

void check_version(int64_t version, const JsonReader& json) {
  if (version != kManifestVersion)
    json.fail(fmt::format("checkpoint format version {}; this program reads version {}", version,
                          kManifestVersion));
}

// Cross-references: slices lie in listed files, and tensors are covered.
void check_manifest(const Manifest& manifest) {
  for (const ManifestTensor& tensor : manifest.tensors) {
    check_coverage(tensor);
    for (const ManifestSlice& slice : tensor.slices) {
      const bool listed =
          std::ranges::binary_search(manifest.files, slice.file, {}, &ManifestFile::name);
      if (!listed)
        throw DataError(fmt::format("tensor {} lies in {}, which is not among the files",
                                    printable_name(tensor.name), printable_name(slice.file)));
    }
  }
}

void check_seal(std::string_view text, const std::string& where) {
  const std::string_view body = text.substr(0, text.size() - std::min(text.size(), kSealBytes));
  if (text != seal_manifest(std::string(body)))
    throw DataError(
        where +
        ": the hash at its end does not match its text; it was cut short, damaged or edited");
}

}  // namespace

std::string seal_manifest(std::string body) {
  const Hash128 hash = hash128(body.data(), static_cast<int64_t>(body.size()));
  body.append(kSealStart).append(to_hex(hash)).append(kSealEnd);
  return body;
}

std::string encode_manifest(const Manifest& manifest) {
  std::string text = seal_manifest(encode_fields(manifest));
  parse_manifest(text, "cannot write this manifest");
  return text;
}

Manifest parse_manifest(std::string_view text, const std::string& where) {
  check_seal(text, where);
  Manifest manifest;
  CheckpointMeta& meta = manifest.meta;
  JsonReader json(text, where);
  json.fields(
      {{"format",
        [&] {
          if (json.string() != kFormat) json.fail("this is no checkpoint of this program");
        }},
       {"version", [&] { check_version(json.integer(), json); }},
       {"created", [&] { manifest.created = json.string(); }},
       {"step", [&] { meta.step = json.unsigned_integer(); }},
       {"seed", [&] { meta.seed = json.integer(); }},
       {"samples_consumed", [&] { meta.samples_consumed = json.unsigned_integer(); }},
       {"skipped_samples",
        [&] { json.array([&] { meta.skipped_samples.push_back(json.unsigned_integer()); }); }},
       {"counters",
        [&] { json.object([&](const std::string& key) { meta.counters[key] = json.integer(); }); }},
       {"values", [&] { meta.values = read_values(json); }},
       {"fingerprints", [&] { meta.fingerprints = read_strings(json); }},
       {"program", [&] { meta.program = read_strings(json); }},
       {"layout", [&] { meta.layout = json.string(); }},
       {"config", [&] { meta.config_yaml = json.string(); }},
       {"files", [&] { read_sorted(json, manifest.files, read_file); }},
       {"tensors", [&] { read_sorted(json, manifest.tensors, read_tensor); }},
       {"xxh3", [&] { json.string(); }}});
  json.end();
  try {
    check_manifest(manifest);
  } catch (const DataError& error) {
    throw DataError(where + ": " + error.what());
  }
  return manifest;
}

std::string encode_shard_info(const ShardInfo& shard) {
  return fmt::format("{{\"file\": {}, \"tensors\": {}}}", encode_file(shard.file),
                     encode_list(shard.tensors, encode_tensor));
}

ShardInfo parse_shard_info(std::string_view text, const std::string& where) {
  ShardInfo shard;
  JsonReader json(text, where);
  json.fields(
      {{"file", [&] { shard.file = read_file(json); }},
       {"tensors", [&] { json.array([&] { shard.tensors.push_back(read_tensor(json)); }); }}});
  json.end();
  return shard;
}

}  // namespace dstrain
