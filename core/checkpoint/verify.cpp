#include "core/checkpoint/verify.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <unordered_map>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/checkpoint/json_strict.h"
#include "core/checkpoint/safetensors.h"
#include "core/checkpoint/store_names.h"

namespace dstrain {
namespace {

constexpr int64_t kMaxManifestBytes = int64_t{1} << 28;
constexpr int64_t kBufferBytes = int64_t{1} << 20;
constexpr size_t kMaxProblemsPerFile = 10;

struct ExpectedSlice {
  const ManifestTensor* tensor;
  const ManifestSlice* slice;
};
using ExpectedSlices = std::unordered_map<std::string, ExpectedSlice>;  // by slice_key

// The checks of one file; problems are appended to the list.
class FileCheck {
 public:
  FileCheck(const std::string& folder, const ManifestFile& file, const ExpectedSlices& expected,
            std::vector<std::string>& problems)
      : path_(join_path(folder, file.name)),
        file_(file),
        expected_(expected),
        problems_(problems) {}

  void run(CheckDepth depth) {
    try {
      const int64_t bytes = File::open_read(path_, Links::refuse).size();
      if (bytes != file_.bytes)
        add(fmt::format("has {} bytes instead of {}", bytes, file_.bytes));
      else if (depth == CheckDepth::contents)
        check_contents(SafetensorsReader(path_, Links::refuse));
    } catch (const Error& error) {
      add(error.what());
    }
    if (count_ > kMaxProblemsPerFile)
      problems_.push_back(
          fmt::format("{}: {} more problems", file_.name, count_ - kMaxProblemsPerFile));
  }

 private:
  void add(const std::string& problem) {
    if (++count_ <= kMaxProblemsPerFile) problems_.push_back(file_.name + ": " + problem);
  }

  void check_contents(const SafetensorsReader& reader) {
    for (const auto& [key, expected] : expected_) check_entry(reader, key, expected);
    // The tensors tile the file behind its header, so this one pass reads every byte.
    const auto& tensors = reader.tensors();
    hash_range(reader.file(), 0, tensors.empty() ? reader.file_bytes() : tensors.front().offset,
               nullptr);
    for (const SafetensorsEntry& entry : tensors) {
      Xxh3Stream tensor_hash;
      hash_range(reader.file(), entry.offset, entry.bytes, &tensor_hash);
      const auto it = expected_.find(entry.name);
      if (it != expected_.end() && it->second.slice->hash != tensor_hash.value64())
        add("xxh3 mismatch at tensor " + printable_name(entry.name));
    }
    if (file_hash_.value128() != file_.hash && count_ == 0)
      add("xxh3 mismatch outside of the listed tensors");
  }

  void check_entry(const SafetensorsReader& reader, const std::string& key,
                   const ExpectedSlice& expected) {
    const SafetensorsEntry* entry = reader.find(key);
    if (entry == nullptr) {
      add("tensor " + printable_name(key) + " is missing");
      return;
    }
    const SafetensorsType type = to_safetensors_type(expected.tensor->dtype);
    if (entry->type != type || entry->shape != expected.slice->extent)
      add(fmt::format("tensor {} is {}{} instead of {}{}", printable_name(key),
                      safetensors_type_name(entry->type), entry->shape, safetensors_type_name(type),
                      expected.slice->extent));
  }

  void hash_range(const File& file, int64_t offset, int64_t bytes, Xxh3Stream* tensor_hash) {
    while (bytes > 0) {
      const int64_t chunk = std::min(bytes, kBufferBytes);
      file.read_exact_at(buffer_.data(), chunk, offset);
      file_hash_.update(buffer_.data(), chunk);
      if (tensor_hash != nullptr) tensor_hash->update(buffer_.data(), chunk);
      offset += chunk;
      bytes -= chunk;
    }
  }

  std::string path_;
  const ManifestFile& file_;
  const ExpectedSlices& expected_;
  std::vector<std::string>& problems_;
  size_t count_ = 0;
  Xxh3Stream file_hash_;
  std::vector<char> buffer_ = std::vector<char>(kBufferBytes);
};

}  // namespace

std::string CheckpointReport::summary() const {
  if (problems.empty()) return "ok";
  if (problems.size() == 1) return problems[0];
  return fmt::format("{} (and {} more)", problems[0], problems.size() - 1);
}

Manifest load_manifest(const std::string& checkpoint_path) {
  const std::string path = join_path(checkpoint_path, kManifestFileName);
  Manifest manifest = parse_manifest(read_small_file(path, kMaxManifestBytes, Links::refuse), path);
  const auto step = parse_checkpoint_name(file_name(checkpoint_path));
  if (step && *step != manifest.meta.step)
    throw DataError(fmt::format("{}: this is the manifest of step {}, but its folder is of step {}",
                                path, manifest.meta.step, *step));
  return manifest;
}

CheckpointReport check_checkpoint(const std::string& path, CheckDepth depth) {
  CheckpointReport report;
  try {
    report.manifest = load_manifest(path);
  } catch (const Error& error) {
    report.problems.push_back(error.what());
    return report;
  }
  std::unordered_map<std::string, ExpectedSlices> expected;  // by file
  for (const ManifestTensor& tensor : report.manifest->tensors)
    for (const ManifestSlice& slice : tensor.slices)
      expected[slice.file].insert({slice_key(tensor, slice), {&tensor, &slice}});
  for (const ManifestFile& file : report.manifest->files)
    FileCheck(path, file, expected[file.name], report.problems).run(depth);
  return report;
}

}  // namespace dstrain
