// Reading safetensors files: the header is untrusted, so every number in it is checked against the
// file before it is used.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "core/base/error.h"
#include "core/checkpoint/json_strict.h"
#include "core/checkpoint/safetensors.h"

namespace dstrain {
namespace {

constexpr int64_t kLengthBytes = 8;
constexpr size_t kMaxNameBytes = 4096;
constexpr size_t kMaxDims = 16;

void read_metadata(JsonReader& json, SafetensorsMetadata& metadata) {
  json.object([&](const std::string& key) { metadata[key] = json.string(); });
}

struct Offsets {
  int64_t begin = 0, end = 0;
};

Offsets read_offsets(JsonReader& json) {
  std::vector<int64_t> values;
  json.array([&] {
    values.push_back(json.unsigned_integer());
    if (values.size() > 2) json.fail("data_offsets has more than two numbers");
  });
  if (values.size() != 2) json.fail("data_offsets needs two numbers, begin and end");
  if (values[0] > values[1]) json.fail(fmt::format("data_offsets {} begin after they end", values));
  return {values[0], values[1]};
}

std::vector<int64_t> read_shape(JsonReader& json) {
  std::vector<int64_t> shape;
  json.array([&] {
    if (shape.size() == kMaxDims) json.fail(fmt::format("a shape has more than {} dims", kMaxDims));
    shape.push_back(json.unsigned_integer());
  });
  return shape;
}

SafetensorsType read_type(JsonReader& json) {
  const std::string name = json.string();
  const auto type = parse_safetensors_type(name);
  if (!type) json.fail(fmt::format("the dtype {} is unknown", printable_name(name)));
  return *type;
}

// Offsets of the entry stay relative to the data area here.
SafetensorsEntry read_entry(JsonReader& json, const std::string& name, int64_t data_bytes) {
  SafetensorsEntry entry;
  entry.name = name;
  std::optional<SafetensorsType> type;
  std::optional<Offsets> offsets;
  bool has_shape = false;
  json.object([&](const std::string& key) {
    if (key == "dtype")
      type = read_type(json);
    else if (key == "shape")
      entry.shape = read_shape(json), has_shape = true;
    else if (key == "data_offsets")
      offsets = read_offsets(json);
    else
      json.fail(fmt::format("tensor {} has an unknown key {}", printable_name(name),
                            printable_name(key)));
  });
  const auto fail = [&](const std::string& problem) {
    json.fail(fmt::format("tensor {} {}", printable_name(name), problem));
  };
  if (!type || !has_shape || !offsets) fail("needs dtype, shape and data_offsets");
  entry.type = *type;
  entry.offset = offsets->begin;
  entry.bytes = offsets->end - offsets->begin;
  const auto wanted = checked_tensor_bytes(entry.shape, safetensors_type_bytes(*type));
  if (!wanted) fail(fmt::format("has the shape {}, whose size overflows 64 bits", entry.shape));
  if (*wanted != entry.bytes)
    fail(fmt::format("has {} bytes by its data_offsets, but shape {} of {} needs {}", entry.bytes,
                     entry.shape, safetensors_type_name(*type), *wanted));
  if (offsets->end > data_bytes)
    fail(fmt::format("ends at byte {} of the data, which has only {} bytes", offsets->end,
                     data_bytes));
  return entry;
}

void check_tiling(std::vector<SafetensorsEntry>& tensors, int64_t data_bytes,
                  const std::string& path) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
  });
  int64_t filled = 0;
  for (const SafetensorsEntry& entry : tensors) {
    if (entry.offset < filled)
      throw DataError(
          fmt::format("{}: tensor {} begins at byte {} of the data, inside another tensor", path,
                      printable_name(entry.name), entry.offset));
    if (entry.offset > filled)
      throw DataError(fmt::format("{}: {} bytes before tensor {} belong to no tensor", path,
                                  entry.offset - filled, printable_name(entry.name)));
    filled += entry.bytes;
  }
  if (filled != data_bytes)
    throw DataError(fmt::format("{}: {} bytes after the last tensor belong to no tensor", path,
                                data_bytes - filled));
}

// Names reach error texts, file listings and other programs' paths.
void check_name(const JsonReader& json, const std::string& name) {
  if (name.empty()) json.fail("a tensor has an empty name");
  if (name.size() > kMaxNameBytes)
    json.fail(fmt::format("the tensor name {} is longer than {} bytes", printable_name(name),
                          kMaxNameBytes));
  const bool has_control = std::any_of(name.begin(), name.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7F;
  });
  if (has_control)
    json.fail(fmt::format("the tensor name {} has control characters", printable_name(name)));
  if (name[0] == '/' || ("/" + name + "/").find("/../") != std::string::npos)
    json.fail(
        fmt::format("the tensor name {} looks like a path out of a folder", printable_name(name)));
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view json_text, int64_t data_offset,
                                           int64_t data_bytes, const std::string& path) {
  if (json_text.empty() || json_text[0] != '{')
    throw DataError(path +
                    ": the safetensors header does not begin with '{'; "
                    "this is no safetensors file, or its start is damaged");
  JsonReader json(json_text, path + ": safetensors header");
  SafetensorsHeader header;
  json.object([&](const std::string& name) {
    if (name == "__metadata__") {
      read_metadata(json, header.metadata);
      return;
    }
    check_name(json, name);
    header.tensors.push_back(read_entry(json, name, data_bytes));
  });
  json.end();
  check_tiling(header.tensors, data_bytes, path);
  for (SafetensorsEntry& entry : header.tensors) entry.offset += data_offset;
  return header;
}

SafetensorsReader::SafetensorsReader(const std::string& path, Links links)
    : file_(File::open_read(path, links)), file_bytes_(file_.size()) {
  if (file_bytes_ < kLengthBytes)
    throw DataError(fmt::format(
        "'{}' has {} bytes; a safetensors file starts with an 8-byte length", path, file_bytes_));
  unsigned char length_bytes[kLengthBytes];
  file_.read_exact_at(length_bytes, kLengthBytes, 0);
  uint64_t length = 0;
  for (int64_t i = kLengthBytes - 1; i >= 0; --i) length = length << 8 | length_bytes[i];
  if (length > static_cast<uint64_t>(kMaxSafetensorsHeaderBytes))
    throw DataError(
        fmt::format("'{}': the safetensors header would have {} bytes; at most {} are "
                    "accepted. This is no safetensors file, or its start is damaged",
                    path, length, kMaxSafetensorsHeaderBytes));
  const auto header_bytes = static_cast<int64_t>(length);
  if (header_bytes > file_bytes_ - kLengthBytes)
    throw DataError(
        fmt::format("'{}': the safetensors header has {} bytes, but the file ends after {}; "
                    "it was cut short",
                    path, header_bytes, file_bytes_ - kLengthBytes));
  std::string json(static_cast<size_t>(header_bytes), '\0');
  file_.read_exact_at(json.data(), header_bytes, kLengthBytes);
  const int64_t data_offset = kLengthBytes + header_bytes;
  header_ =
      parse_safetensors_header(json, data_offset, file_bytes_ - data_offset, "'" + path + "'");

  by_name_.resize(header_.tensors.size());
  std::iota(by_name_.begin(), by_name_.end(), 0);
  std::sort(by_name_.begin(), by_name_.end(), [&](int32_t a, int32_t b) {
    return header_.tensors[static_cast<size_t>(a)].name <
           header_.tensors[static_cast<size_t>(b)].name;
  });
}

const SafetensorsEntry* SafetensorsReader::find(std::string_view name) const {
  const auto name_of = [&](int32_t i) -> const std::string& {
    return header_.tensors[static_cast<size_t>(i)].name;
  };
  const auto it =
      std::lower_bound(by_name_.begin(), by_name_.end(), name,
                       [&](int32_t i, std::string_view wanted) { return name_of(i) < wanted; });
  if (it == by_name_.end() || name_of(*it) != name) return nullptr;
  return &header_.tensors[static_cast<size_t>(*it)];
}

const SafetensorsEntry& SafetensorsReader::at(std::string_view name) const {
  if (const SafetensorsEntry* entry = find(name)) return *entry;
  throw DataError(fmt::format("'{}' has no tensor {}", path(), printable_name(name)));
}

void SafetensorsReader::read(const SafetensorsEntry& entry, int64_t begin, int64_t bytes,
                             void* dst) const {
  DSTRAIN_CHECK(begin >= 0 && bytes >= 0 && begin <= entry.bytes - bytes,
                "byte range outside of tensor " + printable_name(entry.name));
  file_.read_exact_at(dst, bytes, entry.offset + begin);
}

}  // namespace dstrain
