// manifest.json, the commit record of a checkpoint: which files there are, which slice of which
// global tensor lies where, and everything else that influences the next step. It names global
// tensors, never ranks, so that a run resumes at any layout. Format version 1; its last field is a
// hash of all text before it.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/checkpoint/hash.h"
#include "core/tensor/tensor.h"

namespace dstrain {

inline constexpr const char* kManifestFileName = "manifest.json";
inline constexpr int64_t kManifestVersion = 1;
inline constexpr std::string_view kManifestMagic = "{\n  \"format\": \"deepseek-train checkpoint\"";

struct ManifestFile {
  std::string name;  // a plain name inside the checkpoint's folder
  int64_t bytes = 0;
  Hash128 hash;  // of the whole file
};

// The box [offset, offset + extent) of a global tensor, row-major in a tensor of its own inside a
// safetensors file; that tensor's name is slice_key().
struct ManifestSlice {
  std::string file;
  std::vector<int64_t> offset, extent;  // per dim of the global tensor
  uint64_t hash = 0;                    // of the slice's bytes
};

// Its slices cover the global tensor exactly once.
struct ManifestTensor {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  std::vector<ManifestSlice> slices;
};

// Everything in a checkpoint but tensors. Maps are for facts whose set grows with the program.
struct CheckpointMeta {
  int64_t step = 0;  // optimizer steps done
  int64_t seed = 0;
  int64_t samples_consumed = 0;             // the data cursor: index of the next global sample
  std::vector<int64_t> skipped_samples;     // ids that the sample order leaves out
  std::map<std::string, int64_t> counters;  // tokens seen, skipped steps, ...
  std::map<std::string, double> values;     // best loss, loss scale, ...; exact, also inf and nan
  std::map<std::string, std::string> fingerprints;  // of the tokenizer and the datasets
  std::map<std::string, std::string> program;       // version, commit, ISA, threads, libraries
  std::string layout;                               // for people: "data 4, tensor 2"
  std::string config_yaml;                          // the resolved job file
};

struct Manifest {
  std::string created;  // UTC, ISO 8601
  CheckpointMeta meta;
  std::vector<ManifestFile> files;      // by name
  std::vector<ManifestTensor> tensors;  // by name

  const ManifestTensor* find(std::string_view name) const;  // null if absent
  const ManifestTensor& at(std::string_view name) const;    // DataError if absent
  int64_t bytes() const;                                    // of all files
};

// Name of a slice in its file: the global tensor's name, with "[begin:end,...]" if it is a part.
std::string slice_key(const ManifestTensor& tensor, const ManifestSlice& slice);

// The text of manifest.json. DataError if the manifest breaks a rule that the parser checks.
std::string encode_manifest(const Manifest& manifest);
// `where` starts error texts. DataError names the first problem: damage, an unknown or missing
// field, another version, a file name with a folder, a tensor that is not covered exactly once.
Manifest parse_manifest(std::string_view text, const std::string& where);

// The files and tensors of one rank, as text for another rank; parsed as strictly.
struct ShardInfo {
  ManifestFile file;
  std::vector<ManifestTensor> tensors;  // with the slices that this file holds, one or more each
};
std::string encode_shard_info(const ShardInfo& shard);
ShardInfo parse_shard_info(std::string_view text, const std::string& where);

// The tensors of several shards as global ones, sorted by name. DataError if shards contradict each
// other or a tensor is not covered exactly once.
std::vector<ManifestTensor> merge_shards(std::span<const ShardInfo> shards);

// DataError unless the slices cover the tensor exactly once. No more than Tensor::kMaxDims dims.
void check_coverage(const ManifestTensor& tensor);

// Appends the hash field to a manifest's text, which must end after its last field. For tests.
std::string seal_manifest(std::string body);

}  // namespace dstrain
