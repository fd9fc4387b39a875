// Names inside a folder of checkpoints. Only folders and files that match are ever removed.
//   step-00001200                      a checkpoint
//   step-00001200.tmp-<32 hex>         a save that is under way, or that died
//   step-00001200.deleted-<32 hex>     a checkpoint that is being removed
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace dstrain {

inline constexpr const char* kCheckpointFolderName = "checkpoints";  // inside a run folder

std::string checkpoint_name(int64_t step);
std::optional<int64_t> parse_checkpoint_name(std::string_view name);

enum class TemporaryKind { tmp, deleted };
// A name that no other process chooses.
std::string temporary_name(int64_t step, TemporaryKind kind);
bool is_temporary_name(std::string_view name);

std::string shard_file_name(int64_t rank);  // "rank-00003.safetensors"
// A shard or the manifest.
bool is_checkpoint_file_name(std::string_view name);

}  // namespace dstrain
