// Folder operations that the parts of CheckpointStore share.
#pragma once

#include <string>
#include <vector>

namespace dstrain {

std::vector<std::string> names_in_folder(const std::string& path);  // sorted
bool is_real_folder(const std::string& path);                       // follows no link
bool holds_only_checkpoint_files(const std::string& path);
// StorageError at the first file that is not ours. What was removed until then was ours.
void remove_checkpoint_folder(const std::string& path);
// Whether manifest.json begins as ours do, damaged or not behind that.
bool has_manifest_magic(const std::string& checkpoint_path);

}  // namespace dstrain
