// A rank's side of the launcher: where it says what it does, what its console is, and how it ends
// when something is wrong, so that no other rank waits for it.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "apps/rank_board.h"
#include "apps/rank_environment.h"
#include "core/base/log.h"
#include "parallel/watchdog.h"

namespace dstrain {

// Lives as long as the training. The trainer enters each phase in progress().
class RankProcess {
 public:
  // From here on the launcher may send this rank signals: handle_signals() comes before. A rank
  // that makes no progress for `hang_timeout_s` seconds (0: for ever) says where it is and ends
  // with exit code 1, and with it the job.
  RankProcess(const RankEnvironment& ranks, double hang_timeout_s, const Variables& variables);
  RankProcess(const RankProcess&) = delete;
  RankProcess& operator=(const RankProcess&) = delete;

  RankProgress& progress() { return progress_; }

 private:
  std::optional<RankBoard> board_;
  RankProgress progress_;
  std::optional<Watchdog> watchdog_;  // last: it reads the above
};

// Rank 0 logs everything that `options` asks for, the others warnings and errors, which begin with
// "rank 3: ".
LogOptions log_options_of(const RankEnvironment& ranks, LogOptions options);

// Columns of the terminal to which the launcher passes on what this process writes to standard
// error; none if that is no terminal, or there is no launcher.
std::optional<int> launcher_columns(const Variables& variables);

// Tells the launcher, if there is one, that this process ends with this code for a reason of its
// own: of ranks that end together mpirun may name any.
void tell_failure(const Variables& variables, int exit_code);

// Before a rank reports an error that ends it. What went wrong should be read once: a rank that
// only heard of another's failure waits for that one to report it and end the job, and a fault that
// all ranks meet, such as a missing file, is left to rank 0 in the same way. Returns what the
// report begins with, "" or "rank 3: "; none if the job ended meanwhile, as is_ended() tells.
std::optional<std::string> failing_rank_prefix(const Variables& variables, bool is_peer_failure,
                                               const std::function<bool()>& is_ended);

}  // namespace dstrain
