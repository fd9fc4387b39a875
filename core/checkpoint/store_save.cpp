// Saving: the commit protocol of store.h.
#include <fcntl.h>
#include <fmt/format.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/log.h"
#include "core/checkpoint/failpoint.h"
#include "core/checkpoint/safetensors.h"
#include "core/checkpoint/store.h"
#include "core/checkpoint/store_files.h"
#include "core/checkpoint/store_names.h"

namespace dstrain {
namespace {

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

// By falling element size, as SafetensorsWriter needs; otherwise in the given order.
std::vector<const StateTensor*> file_order(std::span<const StateTensor> tensors) {
  std::vector<const StateTensor*> order;
  for (const StateTensor& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return dtype_bytes(a->dtype) > dtype_bytes(b->dtype);
  });
  return order;
}

void write_new_file(const std::string& path, std::string_view contents) {
  File file = File::create_new(path);
  DSTRAIN_FAILPOINT("save.after_manifest_create");
  file.write_all(contents.data(), static_cast<int64_t>(contents.size()));
  DSTRAIN_FAILPOINT("save.after_manifest_write");
  file.sync_all();
  file.close();
}

void rename_folder(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0)
    throw_errno("cannot rename '" + from + "' to", to, errno);
}

// Swaps two folders; false where the file system can not do that in one step (NFS).
bool exchange_folders(const std::string& a, const std::string& b) {
  if (::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0) return true;
  if (errno != EINVAL && errno != ENOSYS) throw_errno("cannot exchange '" + a + "' with", b, errno);
  return false;
}

// Gives the complete folder its final name. A checkpoint of the same step (saved before a resume
// from an earlier one) makes room; its new path is returned, empty if there was none.
std::string publish(const std::string& temporary, const std::string& final_path, int64_t step) {
  if (!path_exists(final_path)) {
    rename_folder(temporary, final_path);
    return "";
  }
  if (!is_real_folder(final_path) || !holds_only_checkpoint_files(final_path))
    throw StorageError("cannot save to '" + final_path +
                       "': what is there is not this program's; move it away");
  if (exchange_folders(temporary, final_path)) return temporary;
  const std::string replaced =
      join_path(parent_folder(final_path), temporary_name(step, TemporaryKind::deleted));
  rename_folder(final_path, replaced);
  try {
    rename_folder(temporary, final_path);
  } catch (...) {
    rename_folder(replaced, final_path);
    throw;
  }
  return replaced;
}

// After this, abandon() finds the attempt in its place.
void unpublish(const std::string& temporary, const std::string& final_path,
               const std::string& replaced) {
  if (replaced == temporary && exchange_folders(temporary, final_path)) return;
  rename_folder(final_path, temporary);
  if (!replaced.empty()) rename_folder(replaced, final_path);
}

}  // namespace

int64_t StateTensor::bytes() const {
  const auto bytes = checked_tensor_bytes(extent, dtype_bytes(dtype));
  DSTRAIN_CHECK(bytes.has_value(), "the size of '" + name + "' overflows 64 bits");
  return *bytes;
}

SaveAttempt CheckpointStore::begin(int64_t step) {
  DSTRAIN_FAILPOINT("save.before_folder");
  create_folders(folder_);  // also when somebody removed it under the run
  SaveAttempt attempt{step, join_path(folder_, temporary_name(step, TemporaryKind::tmp))};
  if (::mkdir(attempt.folder.c_str(), 0777) != 0)
    throw_errno("cannot create the folder", attempt.folder, errno);
  return attempt;
}

ShardInfo CheckpointStore::write_shard(const SaveAttempt& attempt, int64_t rank,
                                       std::span<const StateTensor> tensors) const {
  DSTRAIN_FAILPOINT("save.after_folder");
  ShardInfo shard;
  shard.file.name = shard_file_name(rank);
  const std::vector<const StateTensor*> order = file_order(tensors);
  std::vector<SafetensorsSpec> specs;
  for (const StateTensor* tensor : order) {
    DSTRAIN_CHECK(!tensor->low, "'" + tensor->name + "' is saved in two halves");
    const ManifestSlice slice{shard.file.name, tensor->offset, tensor->extent, 0};
    shard.tensors.push_back({tensor->name, tensor->dtype, tensor->global_shape, {slice}});
    specs.push_back({slice_key(shard.tensors.back(), slice), to_safetensors_type(tensor->dtype),
                     tensor->extent});
  }
  const std::string path = join_path(attempt.folder, shard.file.name);
  File file = File::create_new(path);
  try {
    DSTRAIN_FAILPOINT("save.after_shard_create");
    const SafetensorsMetadata metadata = {{"step", std::to_string(attempt.step)}};
    SafetensorsWriter writer(std::move(file), std::move(specs), metadata);
    for (const StateTensor* tensor : order) writer.append(tensor->data, tensor->bytes());
    const SafetensorsWriter::Summary summary = writer.finish();
    DSTRAIN_FAILPOINT("save.after_shard_close");
    shard.file.bytes = summary.bytes;
    shard.file.hash = summary.hash;
    for (size_t i = 0; i < order.size(); ++i)
      shard.tensors[i].slices[0].hash = summary.tensor_hashes[i];
  } catch (...) {
    ::unlink(path.c_str());
    throw;
  }
  return shard;
}

std::string CheckpointStore::commit(const SaveAttempt& attempt, std::span<const ShardInfo> shards,
                                    const CheckpointMeta& meta) {
  DSTRAIN_CHECK(meta.step == attempt.step, "a save was begun and committed for different steps");
  DSTRAIN_FAILPOINT("save.before_manifest");
  Manifest manifest;
  manifest.created = utc_now();
  manifest.meta = meta;
  for (const ShardInfo& shard : shards) manifest.files.push_back(shard.file);
  std::ranges::sort(manifest.files, {}, &ManifestFile::name);
  manifest.tensors = merge_shards(shards);
  write_new_file(join_path(attempt.folder, kManifestFileName), encode_manifest(manifest));
  DSTRAIN_FAILPOINT("save.after_manifest_fsync");
  flush_folder(attempt.folder);
  DSTRAIN_FAILPOINT("save.after_folder_fsync");

  const std::string final_path = join_path(folder_, checkpoint_name(attempt.step));
  const std::string replaced = publish(attempt.folder, final_path, attempt.step);
  try {
    DSTRAIN_FAILPOINT("save.after_rename");
    flush_folder(folder_);
  } catch (...) {  // the new name may not survive a power cut
    unpublish(attempt.folder, final_path, replaced);
    throw;
  }
  DSTRAIN_FAILPOINT("save.after_parent_fsync");
  verified_.insert(final_path);
  if (!replaced.empty()) {
    DSTRAIN_FAILPOINT("save.before_replaced_removed");
    abandon({attempt.step, replaced});
  }
  return final_path;
}

void CheckpointStore::abandon(const SaveAttempt& attempt) noexcept {
  try {
    DSTRAIN_FAILPOINT("save.before_abandon");
    if (path_exists(attempt.folder)) remove_checkpoint_folder(attempt.folder);
  } catch (const std::exception& error) {
    log_warning("{}; the next start of this run removes the folder", error.what());
  }
}

std::string CheckpointStore::save(const CheckpointMeta& meta,
                                  std::span<const StateTensor> tensors) {
  const SaveAttempt attempt = begin(meta.step);
  std::string path;
  try {
    const ShardInfo shard = write_shard(attempt, 0, tensors);
    path = commit(attempt, {&shard, 1}, meta);
  } catch (...) {
    abandon(attempt);
    throw;
  }
  try {
    for (const std::string& left : apply_retention().left)
      log_warning("'{}' is not removed: it is no checkpoint of this program", left);
  } catch (const Error& error) {
    log_warning("old checkpoints could not be removed: {}", error.what());
  }
  return path;
}

}  // namespace dstrain
