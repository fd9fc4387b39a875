// Whether a job whose ranks failed is started again, and from what. Pure, but for the function that
// lists checkpoints.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dstrain {

// A checkpoint that is there, by name only. Two with equal marks are the same one: `id` changes
// when a folder is deleted and made again.
struct CheckpointMark {
  int64_t step = 0;
  std::string path;
  std::string id;
  bool operator==(const CheckpointMark&) const = default;
};
// Newest first. Empty where there is no such folder.
std::vector<CheckpointMark> mark_checkpoints(const std::string& checkpoints_folder);

// Whether another attempt may end better: not for a job file, a command line or data that are
// wrong, and not for what this user may not do.
bool is_restartable(int exit_code);

// The words of a rank's command line: those this program was given (an option and its value are two
// words), with `resume` in place of --resume and --overwrite where it is set.
std::vector<std::string> rank_words(const std::vector<std::string>& words,
                                    const std::optional<std::string>& resume);

class RestartPolicy {
 public:
  // at_start: the checkpoints before the first attempt.
  RestartPolicy(int64_t max_restarts, std::vector<CheckpointMark> at_start)
      : max_restarts_(max_restarts), at_start_(std::move(at_start)) {}

  struct Decision {
    bool restarts = false;
    // For --resume. None: as at first, since no attempt has saved anything yet.
    std::optional<std::string> resume;
    std::string sentence;  // "starting again from step 800 (restart 1 of 3)", or why not
  };
  // After an attempt that failed with a restartable exit code; now: the checkpoints there are.
  Decision after_failure(const std::vector<CheckpointMark>& now);

  // Failures without a newer checkpoint between them, after which the job counts as unable to go
  // on.
  static constexpr int64_t kNoProgressLimit = 3;

 private:
  const int64_t max_restarts_;
  const std::vector<CheckpointMark> at_start_;
  int64_t restarts_ = 0, failures_here_ = 0;
  std::optional<CheckpointMark> here_;  // the newest of the job at the last failure
};

}  // namespace dstrain
