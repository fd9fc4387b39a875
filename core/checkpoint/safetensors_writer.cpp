// Writing safetensors files in one pass: the header is known before the first byte of data.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "core/base/error.h"
#include "core/checkpoint/failpoint.h"
#include "core/checkpoint/json_strict.h"
#include "core/checkpoint/safetensors.h"

namespace dstrain {
namespace {

// Small enough to be still in the cache when the second hash and write() read it.
constexpr int64_t kChunkBytes = int64_t{1} << 20;

std::string length_prefix(size_t header_bytes) {
  std::string out;
  for (int shift = 0; shift < 64; shift += 8)
    out += static_cast<char>(header_bytes >> shift & 0xFF);
  return out;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(File file, std::vector<SafetensorsSpec> specs,
                                     const SafetensorsMetadata& metadata)
    : file_(std::move(file)), specs_(std::move(specs)) {
  std::string header = "{";
  if (!metadata.empty()) {
    header += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata)
      header += json_quote(key) + ":" + json_quote(value) + ",";
    header.back() = '}';
    header += ',';
  }
  int64_t offset = 0;
  for (const SafetensorsSpec& spec : specs_) {
    const int64_t element_bytes = safetensors_type_bytes(spec.type);
    const auto bytes = checked_tensor_bytes(spec.shape, element_bytes);
    int64_t end = 0;
    DSTRAIN_CHECK(bytes && !__builtin_add_overflow(offset, *bytes, &end),
                  "the size of tensor " + printable_name(spec.name) + " overflows 64 bits");
    DSTRAIN_CHECK(offset % element_bytes == 0, "tensors must be ordered by falling element size");
    header += fmt::format(R"({}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}},)",
                          json_quote(spec.name), safetensors_type_name(spec.type),
                          fmt::join(spec.shape, ","), offset, end);
    tensor_bytes_.push_back(*bytes);
    offset = end;
  }
  if (header.size() > 1) header.pop_back();
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');  // the data area starts at a multiple of 8
  // What a reader would refuse (names, duplicates, length) is refused before anything is written.
  DSTRAIN_CHECK(static_cast<int64_t>(header.size()) <= kMaxSafetensorsHeaderBytes,
                "too many tensors for the header of one safetensors file");
  parse_safetensors_header(header, 0, offset, "cannot write '" + file_.path() + "'");

  header.insert(0, length_prefix(header.size()));
  file_hash_.update(header.data(), static_cast<int64_t>(header.size()));
  file_.write_all(header.data(), static_cast<int64_t>(header.size()));
  summary_.bytes = static_cast<int64_t>(header.size());
  finish_full_tensors();
}

void SafetensorsWriter::append(const void* data, int64_t bytes) {
  const char* in = static_cast<const char*>(data);
  while (bytes > 0) {
    const size_t tensor = summary_.tensor_hashes.size();
    DSTRAIN_CHECK(tensor < specs_.size(),
                  "more data than the header of '" + file_.path() + "' declares");
    const int64_t chunk = std::min({bytes, tensor_bytes_[tensor] - tensor_filled_, kChunkBytes});
    tensor_hash_.update(in, chunk);
    file_hash_.update(in, chunk);
    file_.write_all(in, chunk);
    in += chunk;
    bytes -= chunk;
    tensor_filled_ += chunk;
    summary_.bytes += chunk;
    finish_full_tensors();
  }
}

// Also passes over tensors without elements.
void SafetensorsWriter::finish_full_tensors() {
  while (summary_.tensor_hashes.size() < specs_.size() &&
         tensor_filled_ == tensor_bytes_[summary_.tensor_hashes.size()]) {
    summary_.tensor_hashes.push_back(tensor_hash_.value64());
    tensor_hash_.reset();
    tensor_filled_ = 0;
    DSTRAIN_FAILPOINT("save.after_shard_tensor");
  }
}

SafetensorsWriter::Summary SafetensorsWriter::finish() {
  DSTRAIN_CHECK(summary_.tensor_hashes.size() == specs_.size(),
                "less data than the header of '" + file_.path() + "' declares");
  DSTRAIN_FAILPOINT("save.before_shard_sync");
  file_.sync_data();
  DSTRAIN_FAILPOINT("save.after_shard_sync");
  file_.close();
  summary_.hash = file_hash_.value128();
  return std::move(summary_);
}

}  // namespace dstrain
