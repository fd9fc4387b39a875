// Checks of one checkpoint folder against its manifest.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/checkpoint/manifest.h"

namespace dstrain {

enum class CheckDepth {
  sizes,     // the manifest, and that all files are there with their sizes
  contents,  // also every byte of every file
};

struct CheckpointReport {
  std::optional<Manifest> manifest;   // absent if it could not be read
  std::vector<std::string> problems;  // each names the file and, where one is damaged, the tensor

  bool ok() const { return problems.empty(); }
  // The first problem and how many more there are, as one line.
  std::string summary() const;
};

// Never throws for what it finds in the folder. Reads each file once, front to back.
CheckpointReport check_checkpoint(const std::string& path, CheckDepth depth);

// DataError or NotFoundError naming the file. Follows no symbolic link.
Manifest load_manifest(const std::string& checkpoint_path);

}  // namespace dstrain
