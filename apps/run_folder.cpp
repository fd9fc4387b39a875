#include "apps/run_folder.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <exception>
#include <filesystem>
#include <thread>
#include <utility>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/format_units.h"
#include "core/base/log.h"

namespace dstrain {
namespace {

// The folders of a path that are not there yet, innermost first.
std::vector<std::string> missing_folders(std::string path) {
  std::vector<std::string> missing;
  while (!path.empty() && !path_exists(path)) {
    missing.push_back(path);
    path = parent_folder(path);
  }
  return missing;
}

// Until this run has saved, they are what --resume latest would take.
void warn_of_newer_checkpoints(const CheckpointStore& store, int64_t chosen_step) {
  int64_t count = 0, newest = 0;
  for (const StoredCheckpoint& stored : store.list().checkpoints) {
    if (stored.step <= chosen_step) continue;
    ++count;
    newest = std::max(newest, stored.step);
  }
  if (count == 0) return;
  log_warning(
      "this run goes on from step {}, and '{}' holds {} after it, up to step {}: they stay until "
      "this run saves at their steps, and until it has passed step {} --resume latest takes them "
      "rather than what this run saves; to be rid of them, delete their folders",
      chosen_step, store.folder(), format_plural(count, "checkpoint"), newest, newest);
}

// The ranks of a launcher or of an attempt that was killed take a moment to leave. A rank that
// found the folder in use would be started again until it is free, and with --overwrite delete what
// the other run saved.
RunLock await_ranks_lock(const std::string& run_folder) {
  constexpr std::chrono::milliseconds kLeavingTime{5000}, kLook{100};
  const auto deadline = std::chrono::steady_clock::now() + kLeavingTime;
  while (true) {
    try {
      return RunLock(run_folder, RunLock::Part::ranks);
    } catch (const RuntimeFailure&) {
      if (std::chrono::steady_clock::now() >= deadline) throw;
    }
    std::this_thread::sleep_for(kLook);
  }
}

// Whether nothing has been written there.
bool holds_locks_alone(const std::string& run_folder) {
  std::error_code unread;
  for (const auto& entry : std::filesystem::directory_iterator(run_folder, unread))
    if (entry.path().extension() != ".lock") return false;
  return !unread;
}

}  // namespace

void check_checkpoints_folder(const std::string& run_folder) {
  const RunPaths paths(run_folder);
  if (path_exists(paths.checkpoints)) check_run_folder(paths.checkpoints);
}

RunFolder::RunFolder(const std::string& path, RunRole role)
    : path_(path), made_{missing_folders(path)} {
  prepare_run_folder(path);
  if (role != RunRole::ranks) run_.emplace(path);
  RunLock ranks = await_ranks_lock(path);
  if (role != RunRole::launcher) ranks_.emplace(std::move(ranks));
  check_checkpoints_folder(path);
}

RunFolder::~RunFolder() {
  if (made_.folders.empty()) return;
  try {
    // A launcher's ranks have ended, but for those on hosts that it lost.
    if (!ranks_) ranks_.emplace(path_, RunLock::Part::ranks);
    if (!holds_locks_alone(path_)) return;
    ranks_->remove_file();
    if (run_) run_->remove_file();
  } catch (const std::exception& error) {
    log_warning("what this run made of '{}' stays there: {}", path_, error.what());
  }
}

RunFolder::MadeFolders::~MadeFolders() {
  for (const std::string& folder : folders)
    if (::rmdir(folder.c_str()) != 0 && errno != ENOENT) return;
}

std::optional<VerifiedCheckpoint> choose_checkpoint(const RunPaths& paths, CheckpointStore& store,
                                                    const std::string& resume, bool overwrite) {
  if (overwrite) return std::nullopt;
  const bool present = path_exists(paths.checkpoints) && !store.list().checkpoints.empty();
  if (resume.empty() && present)
    throw ConfigError(fmt::format(
        "'{}' already holds checkpoints; add --resume latest to go on from the newest one, or "
        "--overwrite to delete them and start again",
        paths.folder));
  if (resume == "none" && present)
    throw ConfigError(
        fmt::format("'{}' already holds checkpoints and --resume none would mix two runs; add "
                    "--overwrite, or choose another run.name",
                    paths.folder));
  if (resume.empty() || resume == "none") return std::nullopt;
  if (resume != "latest") {
    VerifiedCheckpoint chosen = find_checkpoint(resume);
    warn_of_newer_checkpoints(store, chosen.manifest.meta.step);
    return chosen;
  }
  if (!present) {
    log_info("no checkpoint in {}: starting from scratch", paths.checkpoints);
    return std::nullopt;
  }
  return store.latest(
      [](const std::string& line) { log_warning("checkpoint rejected: {}", line); });
}

}  // namespace dstrain
