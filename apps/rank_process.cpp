#include "apps/rank_process.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <string_view>
#include <thread>

#include "apps/launch_variables.h"
#include "core/base/error.h"

namespace dstrain {
namespace {

// In which the other ranks can say where they are before the first to end ends them.
constexpr double kLastWordsSeconds = 2;
// mpirun takes a second from the end of a rank that never came to MPI to that of the others.
constexpr std::chrono::milliseconds kFirstRankSpeaks{1200}, kFailedRankSpeaks{1500}, kLook{10};

std::optional<int> number_in(const char* text) {
  if (text == nullptr) return std::nullopt;
  const std::string_view view = text;
  int value = 0;
  const auto [end, error] = std::from_chars(view.data(), view.data() + view.size(), value);
  if (error != std::errc() || end != view.data() + view.size()) return std::nullopt;
  return value;
}

}  // namespace

RankProcess::RankProcess(const RankEnvironment& ranks, double hang_timeout_s,
                         const Variables& variables) {
  if (const char* path = variables(kBoardVariable)) board_ = RankBoard::open(path);
  if (board_ && ranks.local_rank < std::ssize(board_->slots()))
    progress_.share(board_->slots()[static_cast<size_t>(ranks.local_rank)], ranks.rank);
  if (hang_timeout_s <= 0) return;
  watchdog_.emplace(progress_, hang_timeout_s, [this, hang_timeout_s](const RankState& state) {
    log_error("no progress within launch.hang_timeout ({:g} s): {}", hang_timeout_s,
              place_text(state));
    progress_.mark_stuck();
    std::this_thread::sleep_for(
        std::chrono::duration<double>(std::min(kLastWordsSeconds, hang_timeout_s / 2)));
    // Nothing is flushed or unwound: the rank's own thread stands in the middle of something.
    ::_exit(static_cast<int>(ExitCode::failure));
  });
}

LogOptions log_options_of(const RankEnvironment& ranks, LogOptions options) {
  if (!ranks.is_first()) options.level = std::max(options.level, LogLevel::warning);
  options.rank = static_cast<int>(ranks.rank);
  options.world_size = static_cast<int>(ranks.size);
  return options;
}

std::optional<int> launcher_columns(const Variables& variables) {
  const std::optional<int> columns = number_in(variables(kColumnsVariable));
  return columns && *columns > 0 ? columns : std::nullopt;
}

void tell_failure(const Variables& variables, int exit_code) {
  const char* path = variables(kBoardVariable);
  const std::optional<int> place = number_in(variables("OMPI_COMM_WORLD_LOCAL_RANK"));
  if (path == nullptr || !place || *place < 0) return;
  const std::optional<RankBoard> board = RankBoard::open(path);
  if (board && *place < std::ssize(board->slots()))
    mark_failed(board->slots()[static_cast<size_t>(*place)], exit_code);
}

std::optional<std::string> failing_rank_prefix(const Variables& variables, bool is_peer_failure,
                                               const std::function<bool()>& is_ended) {
  std::optional<int> rank;
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "SLURM_PROCID"})
    if (!rank) rank = number_in(variables(name));
  if (!rank) return "";
  auto wait = *rank == 0 ? std::chrono::milliseconds(0) : kFirstRankSpeaks;
  if (is_peer_failure) wait += kFailedRankSpeaks;
  for (; wait.count() > 0; wait -= kLook) {
    if (is_ended()) return std::nullopt;
    std::this_thread::sleep_for(kLook);
  }
  return *rank == 0 ? "" : fmt::format("rank {}: ", *rank);
}

}  // namespace dstrain
