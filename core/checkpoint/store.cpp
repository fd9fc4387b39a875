// Listing, choosing and removing checkpoints.
#include "core/checkpoint/store.h"

#include <dirent.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/log.h"
#include "core/checkpoint/failpoint.h"
#include "core/checkpoint/store_files.h"
#include "core/checkpoint/store_names.h"

namespace dstrain {

std::vector<std::string> names_in_folder(const std::string& path) {
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir(path.c_str()), ::closedir);
  if (!folder) throw_errno("cannot list the folder", path, errno);
  std::vector<std::string> names;
  errno = 0;
  while (const dirent* entry = ::readdir(folder.get())) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  if (errno != 0) throw_errno("cannot list the folder", path, errno);
  std::sort(names.begin(), names.end());
  return names;
}

bool is_real_folder(const std::string& path) {
  struct stat info;
  return ::lstat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

bool holds_only_checkpoint_files(const std::string& path) {
  const std::vector<std::string> names = names_in_folder(path);
  return std::all_of(names.begin(), names.end(), is_checkpoint_file_name);
}

void remove_checkpoint_folder(const std::string& path) {
  for (const std::string& name : names_in_folder(path)) {  // sorted: the manifest goes first
    const std::string file = join_path(path, name);
    if (!is_checkpoint_file_name(name))
      throw StorageError("cannot remove the folder '" + path + "': '" + name +
                         "' is not this program's");
    if (::unlink(file.c_str()) != 0) throw_errno("cannot remove", file, errno);
    DSTRAIN_FAILPOINT("remove.after_unlink");
  }
  DSTRAIN_FAILPOINT("remove.before_rmdir");
  if (::rmdir(path.c_str()) != 0) throw_errno("cannot remove the folder", path, errno);
}

bool has_manifest_magic(const std::string& checkpoint_path) {
  std::string start(kManifestMagic.size(), '\0');
  try {
    const File file = File::open_read(join_path(checkpoint_path, kManifestFileName), Links::refuse);
    file.read_exact_at(start.data(), static_cast<int64_t>(start.size()), 0);
  } catch (const Error&) {
    return false;
  }
  return start == kManifestMagic;
}

CheckpointStore::CheckpointStore(std::string folder, int64_t keep)
    : folder_(std::move(folder)), keep_(keep) {
  DSTRAIN_CHECK(keep_ >= 1, "a store keeps at least one checkpoint");
}

StoreListing CheckpointStore::list() const {
  StoreListing listing;
  if (!path_exists(folder_)) return listing;
  for (const std::string& name : names_in_folder(folder_)) {
    const std::string path = join_path(folder_, name);
    const auto step = parse_checkpoint_name(name);
    if (!is_real_folder(path))
      listing.unknown.push_back(path);
    else if (step)
      listing.checkpoints.push_back({*step, path});
    else if (is_temporary_name(name))
      listing.leftovers.push_back(path);
    else
      listing.unknown.push_back(path);
  }
  std::sort(listing.checkpoints.begin(), listing.checkpoints.end(),
            [](const auto& a, const auto& b) { return a.step > b.step; });
  return listing;
}

std::optional<VerifiedCheckpoint> CheckpointStore::latest(
    const std::function<void(const std::string&)>& on_rejected) {
  DSTRAIN_FAILPOINT("restore.before_scan");
  std::vector<std::string> rejected;
  for (const StoredCheckpoint& checkpoint : list().checkpoints) {
    DSTRAIN_FAILPOINT("restore.before_check");
    CheckpointReport report = check_checkpoint(checkpoint.path, CheckDepth::contents);
    DSTRAIN_FAILPOINT("restore.after_check");
    if (report.ok()) {
      verified_.insert(checkpoint.path);
      return VerifiedCheckpoint{checkpoint.path, std::move(*report.manifest)};
    }
    rejected.push_back(fmt::format("{}: {}", file_name(checkpoint.path), report.summary()));
    if (on_rejected) on_rejected(rejected.back());
  }
  if (rejected.empty()) return std::nullopt;
  throw DataError(
      fmt::format("no checkpoint in '{}' can be used:\n  {}\nRestore one of them from a copy, or "
                  "start over with --overwrite",
                  folder_, fmt::join(rejected, "\n  ")));
}

// What this object wrote or read entirely is only looked at for its sizes.
bool CheckpointStore::is_verified(const std::string& path) {
  const CheckDepth depth = verified_.contains(path) ? CheckDepth::sizes : CheckDepth::contents;
  const bool ok = check_checkpoint(path, depth).ok();
  if (ok)
    verified_.insert(path);
  else
    verified_.erase(path);
  return ok;
}

RetentionReport CheckpointStore::apply_retention() {
  constexpr int64_t kAlwaysKeptVerified = 2;
  RetentionReport report;
  int64_t kept = 0, kept_verified = 0;
  for (const StoredCheckpoint& checkpoint : list().checkpoints) {
    if (kept_verified < kAlwaysKeptVerified) {
      if (is_verified(checkpoint.path)) ++kept_verified;
      ++kept;
    } else if (kept < keep_) {
      ++kept;
    } else if (has_manifest_magic(checkpoint.path) &&
               holds_only_checkpoint_files(checkpoint.path)) {
      retire(checkpoint);
      report.removed.push_back(checkpoint.path);
    } else {
      report.left.push_back(checkpoint.path);
    }
  }
  return report;
}

void CheckpointStore::retire(const StoredCheckpoint& checkpoint) {
  DSTRAIN_FAILPOINT("retention.before_rename");
  // Under another name first: a half-removed folder must not pass for a checkpoint.
  const std::string doomed =
      join_path(folder_, temporary_name(checkpoint.step, TemporaryKind::deleted));
  if (::rename(checkpoint.path.c_str(), doomed.c_str()) != 0)
    throw_errno("cannot rename", checkpoint.path, errno);
  DSTRAIN_FAILPOINT("retention.after_rename");
  flush_folder(folder_);
  DSTRAIN_FAILPOINT("retention.after_parent_fsync");
  verified_.erase(checkpoint.path);
  remove_checkpoint_folder(doomed);
}

std::vector<std::string> CheckpointStore::remove_leftovers(const RunLock&) {
  std::vector<std::string> removed;
  const StoreListing listing = list();
  for (const std::string& path : listing.leftovers) {
    if (!holds_only_checkpoint_files(path)) {
      log_warning("'{}' holds files that are not this program's; it is left alone", path);
      continue;
    }
    remove_checkpoint_folder(path);
    removed.push_back(path);
  }
  for (const std::string& path : listing.unknown)
    log_warning("'{}' is no checkpoint; it is left alone", path);
  return removed;
}

void CheckpointStore::remove_all(const RunLock&) {
  const std::vector<StoredCheckpoint> checkpoints = list().checkpoints;
  for (const StoredCheckpoint& checkpoint : checkpoints)
    if (!holds_only_checkpoint_files(checkpoint.path))
      throw StorageError("'" + checkpoint.path +
                         "' holds files that are not this program's; move them away");
  for (const StoredCheckpoint& checkpoint : checkpoints) retire(checkpoint);
}

}  // namespace dstrain
