// The safetensors file format: 8 bytes header length (little endian), a JSON header
//   {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__":
//   {...}}
// and the tensors' bytes, row-major, little endian, without holes. Checkpoint shards and
// Hugging Face weights are such files.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/base/file.h"
#include "core/checkpoint/hash.h"
#include "core/tensor/tensor.h"

namespace dstrain {

// What a file may hold; a subset is a DType of ours.
enum class SafetensorsType : uint8_t {
  boolean,
  u8,
  i8,
  f8_e4m3,
  f8_e5m2,
  f8_e8m0,
  u16,
  i16,
  f16,
  bf16,
  u32,
  i32,
  f32,
  u64,
  i64,
  f64
};

const char* safetensors_type_name(SafetensorsType type);  // as in files: "BF16"
int64_t safetensors_type_bytes(SafetensorsType type);
std::optional<SafetensorsType> parse_safetensors_type(std::string_view name);
SafetensorsType to_safetensors_type(DType dtype);
std::optional<DType> to_dtype(SafetensorsType type);  // nothing where we have no such type

// f16, bf16, f32 and f64 to f32; DataError for another type. src need not be aligned.
void convert_to_f32(SafetensorsType type, const void* src, int64_t count, float* dst);
// Back, rounded to nearest even; gives back the bits that convert_to_f32 read, NaN payloads included, except
// of an F64 that f32 had to round. False if a finite value became infinite. DataError for another type.
bool convert_from_f32(SafetensorsType type, const float* src, int64_t count, void* dst);

// Product of the dims times the element size; nothing if it exceeds 2^63 - 1. A dim of 0 does not
// hide an overflow of the others.
std::optional<int64_t> checked_tensor_bytes(std::span<const int64_t> shape, int64_t element_bytes);

using SafetensorsMetadata = std::map<std::string, std::string>;

struct SafetensorsEntry {
  std::string name;
  SafetensorsType type = SafetensorsType::f32;
  std::vector<int64_t> shape;
  int64_t offset = 0;  // from the start of the file
  int64_t bytes = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> tensors;  // in the order of their bytes
  SafetensorsMetadata metadata;
};

inline constexpr int64_t kMaxSafetensorsHeaderBytes = 100'000'000;

// Checks every rule of the format: known keys and types, no duplicate, sizes that fit, and tensors
// that tile the data area of data_bytes, which starts at data_offset in the file. DataError else.
SafetensorsHeader parse_safetensors_header(std::string_view json, int64_t data_offset,
                                           int64_t data_bytes, const std::string& path);

// An open file whose header was checked. Reading is thread-safe.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path, Links links = Links::follow);

  const std::string& path() const { return file_.path(); }
  const File& file() const { return file_; }
  int64_t file_bytes() const { return file_bytes_; }
  const std::vector<SafetensorsEntry>& tensors() const { return header_.tensors; }
  const SafetensorsMetadata& metadata() const { return header_.metadata; }

  const SafetensorsEntry* find(std::string_view name) const;  // null if absent
  const SafetensorsEntry& at(std::string_view name) const;    // DataError if absent

  void read(const SafetensorsEntry& entry, void* dst) const { read(entry, 0, entry.bytes, dst); }
  // Bytes [begin, begin + bytes) of the tensor.
  void read(const SafetensorsEntry& entry, int64_t begin, int64_t bytes, void* dst) const;

 private:
  File file_;
  int64_t file_bytes_ = 0;
  SafetensorsHeader header_;
  std::vector<int32_t> by_name_;  // indices into header_.tensors
};

struct SafetensorsSpec {
  std::string name;
  SafetensorsType type = SafetensorsType::f32;
  std::vector<int64_t> shape;
};

// Writes a file from front to back; hashes are computed on the way. Tensors must be ordered by
// falling element size, so that each is aligned to its type. Errors are thrown at once; after one
// the file is worthless and the caller removes it.
class SafetensorsWriter {
 public:
  struct Summary {
    int64_t bytes = 0;
    Hash128 hash;                         // of the whole file
    std::vector<uint64_t> tensor_hashes;  // in the order of the specs
  };

  // Writes the header.
  SafetensorsWriter(File file, std::vector<SafetensorsSpec> specs,
                    const SafetensorsMetadata& metadata);

  // The next bytes of the data area; pieces need not end where tensors do.
  void append(const void* data, int64_t bytes);
  // All bytes must have been appended. Flushes to the disk and closes.
  Summary finish();

 private:
  void finish_full_tensors();

  File file_;
  std::vector<SafetensorsSpec> specs_;
  std::vector<int64_t> tensor_bytes_;
  int64_t tensor_filled_ = 0;  // bytes of the current tensor, whose index is the number of hashes
  Xxh3Stream tensor_hash_, file_hash_;
  Summary summary_;
};

}  // namespace dstrain
