#include "apps/restart_policy.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <utility>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/format_units.h"
#include "core/checkpoint/store.h"

namespace dstrain {
namespace {

std::string identity_of(const std::string& path) {
  struct stat info;
  if (::stat(path.c_str(), &info) != 0) return "";
  return fmt::format("{}:{}:{}.{}", info.st_dev, info.st_ino, info.st_mtim.tv_sec,
                     info.st_mtim.tv_nsec);
}

bool holds(const std::vector<CheckpointMark>& marks, const CheckpointMark& mark) {
  return std::find(marks.begin(), marks.end(), mark) != marks.end();
}

}  // namespace

std::vector<CheckpointMark> mark_checkpoints(const std::string& checkpoints_folder) {
  std::vector<CheckpointMark> marks;
  if (!is_folder(checkpoints_folder)) return marks;
  for (const StoredCheckpoint& stored : CheckpointStore(checkpoints_folder, 1).list().checkpoints)
    marks.push_back({stored.step, stored.path, identity_of(stored.path)});
  return marks;
}

bool is_restartable(int exit_code) {
  switch (static_cast<ExitCode>(exit_code)) {
    case ExitCode::ok:
    case ExitCode::preempted:
    case ExitCode::usage:
    case ExitCode::bad_data:
    case ExitCode::no_input:
    case ExitCode::no_permission:
    case ExitCode::bad_config:
      return false;
    default:
      return true;
  }
}

std::vector<std::string> rank_words(const std::vector<std::string>& words,
                                    const std::optional<std::string>& resume) {
  if (!resume) return words;
  std::vector<std::string> out;
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] == "--resume")
      ++i;  // and its value
    else if (words[i] != "--overwrite")
      out.push_back(words[i]);
  }
  out.insert(out.end(), {"--resume", *resume});
  return out;
}

RestartPolicy::Decision RestartPolicy::after_failure(const std::vector<CheckpointMark>& now) {
  const auto saved = std::find_if(now.begin(), now.end(),
                                  [&](const CheckpointMark& m) { return !holds(at_start_, m); });
  const std::optional<CheckpointMark> reached =
      saved == now.end() ? std::nullopt : std::optional(*saved);
  failures_here_ = reached == here_ ? failures_here_ + 1 : 1;
  here_ = reached;

  Decision decision;
  const std::string place =
      reached ? fmt::format("step {}", reached->step) : std::string("where it began");
  if (failures_here_ >= kNoProgressLimit) {
    decision.sentence = fmt::format(
        "the job failed {} without a checkpoint newer than {}; it is not started again, since it "
        "would fail there again",
        format_plural(failures_here_, "time"), reached ? place : "those it began with");
    return decision;
  }
  if (restarts_ >= max_restarts_) {
    decision.sentence =
        max_restarts_ == 0
            ? "launch.max_restarts is 0: the job is not started again"
            : fmt::format("the job was started again {} (launch.max_restarts); it is given up",
                          format_plural(restarts_, "time"));
    return decision;
  }
  decision.restarts = true;
  // Older attempts may have left newer checkpoints, which the user chose not to go on from.
  if (reached) decision.resume = *reached == now.front() ? "latest" : reached->path;
  decision.sentence =
      fmt::format("starting again from {} (restart {} of {})", place, ++restarts_, max_restarts_);
  return decision;
}

}  // namespace dstrain
