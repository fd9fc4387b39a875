// ckpt ls, ckpt verify: what checkpoints a run has, and whether they are whole.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <chrono>

#include "apps/commands.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/format_units.h"
#include "core/checkpoint/json_strict.h"
#include "core/checkpoint/store.h"
#include "core/checkpoint/store_names.h"

namespace dstrain {
namespace {

// The checkpoints of a run folder, or of a folder that holds them directly.
StoreListing list_run(const std::string& path) {
  if (!is_folder(path)) throw NotFoundError("there is no run folder '" + path + "'");
  const std::string inner = join_path(path, kCheckpointFolderName);
  StoreListing listing = CheckpointStore(is_folder(inner) ? inner : path, /*keep=*/1).list();
  if (listing.checkpoints.empty()) throw NotFoundError("'" + path + "' holds no checkpoints");
  return listing;
}

std::string json_strings(const std::vector<std::string>& texts) {
  std::vector<std::string> quoted;
  for (const std::string& text : texts) quoted.push_back(json_quote(text));
  return fmt::format("[{}]", fmt::join(quoted, ", "));
}

void print_json(const std::string& path, const CheckpointReport& report) {
  std::string facts;
  if (report.manifest)
    facts = fmt::format(R"("step": {}, "created": {}, "files": {}, "bytes": {}, )",
                        report.manifest->meta.step, json_quote(report.manifest->created),
                        report.manifest->files.size(), report.manifest->bytes());
  fmt::print("{{\"path\": {}, {}\"ok\": {}, \"problems\": {}}}\n", json_quote(path), facts,
             report.ok(), json_strings(report.problems));
}

void print_verified(const std::string& path, const CheckpointReport& report, double seconds) {
  if (report.ok()) {
    const int64_t bytes = report.manifest->bytes();
    fmt::print("{}: ok, {} in {}, read at {:.1f} GB/s\n", path, format_bytes(bytes),
               format_plural(std::ssize(report.manifest->files), "file"),
               static_cast<double>(bytes) / 1e9 / seconds);
    return;
  }
  fmt::print("{}: damaged\n", path);
  for (const std::string& problem : report.problems) fmt::print("  {}\n", problem);
}

}  // namespace

int cmd_ckpt_ls(const CkptOptions& options) {
  const StoreListing listing = list_run(options.path);
  if (!options.json)
    fmt::print("{:>10}  {:>10}  {:>5}  {:<20}  {}\n", "step", "size", "files", "created", "state");
  for (const StoredCheckpoint& checkpoint : listing.checkpoints) {
    const CheckpointReport report = check_checkpoint(checkpoint.path, CheckDepth::sizes);
    if (options.json)
      print_json(checkpoint.path, report);
    else if (!report.manifest)
      fmt::print("{:>10}  {:>10}  {:>5}  {:<20}  damaged: {}\n", checkpoint.step, "-", "-", "-",
                 report.summary());
    else
      fmt::print("{:>10}  {:>10}  {:>5}  {:<20}  {}\n", checkpoint.step,
                 format_bytes(report.manifest->bytes()), report.manifest->files.size(),
                 report.manifest->created,
                 report.ok() ? "complete" : "damaged: " + report.summary());
  }
  if (!options.json && !listing.leftovers.empty())
    fmt::print("unfinished saves: {}; removed when the run goes on\n", listing.leftovers.size());
  return static_cast<int>(ExitCode::ok);
}

int cmd_ckpt_verify(const CkptOptions& options) {
  if (!path_exists(options.path)) throw NotFoundError("there is no '" + options.path + "'");
  std::vector<StoredCheckpoint> checkpoints;
  if (path_exists(join_path(options.path, kManifestFileName)) ||
      parse_checkpoint_name(file_name(options.path)))
    checkpoints.push_back({0, options.path});
  else
    checkpoints = list_run(options.path).checkpoints;
  bool all_ok = true;
  for (const StoredCheckpoint& checkpoint : checkpoints) {
    const auto begin = std::chrono::steady_clock::now();
    const CheckpointReport report = check_checkpoint(checkpoint.path, CheckDepth::contents);
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    all_ok = all_ok && report.ok();
    if (options.json)
      print_json(checkpoint.path, report);
    else
      print_verified(checkpoint.path, report, seconds);
  }
  return static_cast<int>(all_ok ? ExitCode::ok : ExitCode::bad_data);
}

}  // namespace dstrain
