// Reading any slice of a global tensor from a checkpoint, however the run that saved it was laid
// out: a run resumes at any other layout through this alone.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>

#include "core/checkpoint/manifest.h"
#include "core/checkpoint/safetensors.h"
#include "core/checkpoint/store.h"

namespace dstrain {

// One checkpoint, open for reading; it should have been verified. Files are opened when first
// needed and only the bytes of the slice are read. Used by one thread at a time.
class CheckpointReader {
 public:
  explicit CheckpointReader(const std::string& checkpoint_path);  // loads the manifest
  CheckpointReader(std::string checkpoint_path, Manifest manifest);

  const Manifest& manifest() const { return manifest_; }
  const std::string& path() const { return path_; }

  // Copies the box [offset, offset + extent) of the global tensor to dst, contiguous, row-major.
  // DataError if there is no such tensor, if the box leaves it, or if a file does not fit the
  // manifest.
  void read_slice(const std::string& name, std::span<const int64_t> offset,
                  std::span<const int64_t> extent, void* dst);
  // The same for the box that `wanted` describes. Its dtype and global shape must be those of the
  // checkpoint: DataError naming both otherwise. wanted.data is not used.
  void read(const StateTensor& wanted, void* dst);
  // The same in f32 for values that the checkpoint holds as f32 or bf16, whatever wanted.dtype is.
  void read_f32(const StateTensor& wanted, float* dst);

 private:
  [[noreturn]] void throw_misfit(const StateTensor& wanted) const;
  const SafetensorsReader& file(const std::string& name);

  std::string path_;
  Manifest manifest_;
  std::map<std::string, SafetensorsReader> files_;
};

}  // namespace dstrain
