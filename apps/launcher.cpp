#include "apps/launcher.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <utility>

#include "apps/mpirun_job.h"
#include "apps/rank_board.h"
#include "apps/restart_policy.h"
#include "core/base/error.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "parallel/watchdog.h"

namespace dstrain {
namespace {

constexpr double kTick = 0.2;  // seconds between looks at the clock and the board
constexpr int kAbove = 128;  // exit codes from here on are not those of a rank that left by itself

double now_s() {
  return 1e-9 * static_cast<double>(monotonic_ns());
}

// "SIGSEGV"
std::string signal_name(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name != nullptr ? std::string("SIG") + name : fmt::format("signal {}", signal);
}

// "rank 2", "ranks 0, 1, 3"
std::string ranks_text(const std::vector<int64_t>& ranks) {
  return fmt::format("rank{} {}", ranks.size() == 1 ? "" : "s", fmt::join(ranks, ", "));
}

bool is_hung(const std::vector<RankState>& states) {
  return std::any_of(states.begin(), states.end(),
                     [](const RankState& state) { return state.is_stuck; });
}

// The letter that Linux has for the state of a process; '\0' if there is none.
char process_state(pid_t pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  const std::string stat{std::istreambuf_iterator<char>(file), {}};
  const size_t state = stat.rfind(')') + 2;  // the name before may hold anything
  return state < stat.size() ? stat[state] : '\0';
}

// Whether SIGSTOP or a debugger holds the process, so that its own watchdog cannot speak.
bool is_stopped(pid_t pid) {
  const char state = process_state(pid);
  return state == 'T' || state == 't';
}

bool is_gone(pid_t pid) {
  const char state = process_state(pid);
  return state == '\0' || state == 'Z' || state == 'X';
}

// Where the ranks stood when their watchdogs found them stuck: the fewest first, since they are
// what the others waited for. `stopped`: those that were then.
std::string hang_text(const std::vector<RankState>& states, const std::vector<int64_t>& stopped) {
  struct Place {
    std::vector<int64_t> ranks;
    RankState longest;
  };
  std::map<std::pair<int64_t, RankPhase>, Place> places;
  for (const RankState& state : states) {
    Place& place = places[{state.step, state.phase}];
    place.ranks.push_back(state.rank);
    if (state.seconds > place.longest.seconds) place.longest = state;
  }
  std::vector<Place> sorted;
  for (auto& [key, place] : places) sorted.push_back(std::move(place));
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const Place& a, const Place& b) { return a.ranks.size() < b.ranks.size(); });
  std::string text = "the job hung";
  for (const Place& place : sorted)
    text += fmt::format("; {}: {}", ranks_text(place.ranks), place_text(place.longest));
  if (!stopped.empty())
    text += fmt::format("; stopped, as by SIGSTOP or a debugger: {}", ranks_text(stopped));
  return text;
}

class Launcher {
 public:
  explicit Launcher(const LaunchJob& job)
      : job_(job),
        session_(session_bytes(total_ranks(job.plan.hosts)), job.temporary_folders),
        out_(STDOUT_FILENO, false),
        err_(STDERR_FILENO, job.plan.columns.has_value()) {
    set_log_writer([this](std::string_view line) { err_.line(line); });
  }
  ~Launcher() { set_log_writer({}); }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  int run();

 private:
  // What a job leaves: whether its ranks had come, and where each was last seen.
  struct End {
    int code = 0;    // of mpirun, which passes on that of the first rank that failed
    int signal = 0;  // that ended mpirun itself
    std::optional<RankFailure> failure;
    std::vector<RankState> states;
    std::vector<int64_t> stopped;  // ranks, when the job was found to hang
  };

  // Open MPI takes 4 MiB of shared memory for each rank, and its session files.
  static int64_t session_bytes(int64_t ranks) { return (ranks * 5 + 16) << 20; }

  bool is_local() const { return job_.plan.hosts.front().host.empty(); }
  End attempt(const std::optional<std::string>& resume);
  static void find_first_failure(End& end);
  void take_signals(MpirunJob& mpirun);
  void act(MpirunJob& mpirun, const RankBoard& board);
  void end_hung(MpirunJob& mpirun, const RankBoard& board);
  bool have_come(const RankBoard& board) const;
  bool is_ending(const RankBoard& board) const;
  bool have_gone(const RankBoard& board) const;
  void ask_to_leave(int signal);
  void pause();
  int exit_code_after_leaving(const End& end) const;
  static int own_code(const End& end) {
    return end.code < kAbove ? end.code : static_cast<int>(ExitCode::failure);
  }
  bool has_started(const End& end) const { return !is_local() || !end.states.empty(); }
  std::string failure_text(const End& end) const;

  const LaunchJob& job_;
  SignalQueue signals_;
  SessionFolder session_;
  OutputRelay out_, err_;

  int64_t attempts_ = 0;
  double started_ = 0;  // of the last one
  std::optional<double> hung_at_;
  std::vector<int64_t> stopped_;  // ranks, at that time
  int hung_signals_ = 0;  // sent since
  bool is_save_wanted_ = false, is_child_ended_ = false;
  int leave_signal_ = 0;  // that asked first
  double leave_by_ = 0;
  enum class Leaving { no, wanted, asked, ending, killed } leaving_ = Leaving::no;
  bool is_interrupted_ = false;  // by a second Ctrl-C
};

void Launcher::ask_to_leave(int signal) {
  if (leaving_ != Leaving::no) {
    // Once more, from a person. Anything else repeats what is under way.
    if (signal == SIGINT && leave_signal_ == SIGINT) {
      is_interrupted_ = true;
      leave_by_ = std::min(leave_by_, now_s());
    }
    return;
  }
  leave_signal_ = signal;
  leave_by_ = now_s() + job_.times.grace_s;
  leaving_ = Leaving::wanted;
  log_info("{}: the ranks save and leave, for which they have {:g} s{}", signal_name(signal),
           job_.times.grace_s, signal == SIGINT ? "; a second Ctrl-C ends them at once" : "");
}

// SIGCHLD wakes this process early, where no thread of a library takes it.
void Launcher::take_signals(MpirunJob& mpirun) {
  while (const int signal = signals_.next()) {
    if (signal == SIGUSR1)
      is_save_wanted_ = true;
    else if (signal != SIGCHLD)
      ask_to_leave(signal);
  }
  is_child_ended_ = mpirun.reap();
}

bool Launcher::have_come(const RankBoard& board) const {
  const auto come = static_cast<int64_t>(board.states().size());
  if (is_local() && come == total_ranks(job_.plan.hosts)) return true;
  return now_s() - started_ > job_.times.ready_s;
}

// Whether mpirun has begun to end the job: it does so once the first rank has left, save or not.
bool Launcher::is_ending(const RankBoard& board) const {
  const std::vector<RankState> states = board.states();
  return std::any_of(states.begin(), states.end(),
                     [](const RankState& state) { return is_gone(state.pid); });
}

// Whether all ranks have come and ended, after which mpirun ends as well.
bool Launcher::have_gone(const RankBoard& board) const {
  const std::vector<RankState> states = board.states();
  return is_local() && std::ssize(states) == total_ranks(job_.plan.hosts) &&
         std::all_of(states.begin(), states.end(),
                     [](const RankState& state) { return is_gone(state.pid); });
}

void Launcher::act(MpirunJob& mpirun, const RankBoard& board) {
  const bool is_ready = have_come(board);
  if (is_save_wanted_ && is_ready) {
    is_save_wanted_ = false;
    mpirun.send(SIGUSR1);
  }
  if (leaving_ == Leaving::wanted && is_ready) {
    leaving_ = Leaving::asked;
    mpirun.send(SIGUSR2);
  }
  if (leaving_ == Leaving::no || now_s() < leave_by_) return;
  if (leaving_ == Leaving::killed) return;
  if (leaving_ == Leaving::ending) {
    leaving_ = Leaving::killed;
    mpirun.send(SIGKILL);
    return;
  }
  leaving_ = Leaving::ending;
  leave_by_ = now_s() + job_.times.end_s;
  // It takes a second or two, and Open MPI 4's mpirun crashes if it is asked to end meanwhile.
  if (is_ending(board)) return;
  if (!is_interrupted_)
    log_warning(
        "the ranks did not leave within {:g} s and are ended; what came after the newest "
        "checkpoint is lost",
        job_.times.grace_s);
  mpirun.send(SIGTERM);
}

// SIGTERM once and SIGKILL once: mpirun takes repeated ones for impatience and leaves files behind.
void Launcher::end_hung(MpirunJob& mpirun, const RankBoard& board) {
  if (!hung_at_) {
    const std::vector<RankState> states = board.states();
    // Open MPI 4's mpirun hangs itself after some faults while ranks start, as of shared memory.
    if (!is_hung(states) && !have_gone(board)) return;
    hung_at_ = now_s();
    for (const RankState& state : states)
      if (is_stopped(state.pid)) stopped_.push_back(state.rank);
  }
  const double waited = now_s() - *hung_at_;
  if (hung_signals_ == 0 && waited > job_.times.hung_s) {
    ++hung_signals_;
    log_warning("mpirun {}; it is ended",
                have_gone(board)
                    ? "does not end, although its ranks have"
                    : "does not end the ranks, which may be on a host that cannot be reached");
    mpirun.send(SIGTERM);
  } else if (hung_signals_ == 1 && waited > job_.times.hung_s + job_.times.end_s) {
    ++hung_signals_;
    mpirun.send(SIGKILL);
  }
}

Launcher::End Launcher::attempt(const std::optional<std::string>& resume) {
  LaunchPlan plan = job_.plan;
  plan.session_folder = session_.path();
  const MpirunCommand command = mpirun_command(plan, rank_words(job_.words, resume));
  if (attempts_++ == 0)
    for (const std::string& note : command.notes) log_info("{}", note);
  log_info("starting {}: {}", format_plural(total_ranks(plan.hosts), "rank"),
           shell_text(command.words));
  const std::string path = board_path(plan.session_folder);
  ::unlink(path.c_str());
  const RankBoard board = RankBoard::create(path, total_ranks(plan.hosts));
  MpirunJob mpirun(command, out_, err_);
  started_ = now_s();
  hung_at_.reset();
  stopped_.clear();
  hung_signals_ = 0;
  is_child_ended_ = false;
  while (!is_child_ended_) {
    mpirun.wait(signals_, kTick);
    take_signals(mpirun);
    if (is_child_ended_) break;
    act(mpirun, board);
    end_hung(mpirun, board);
  }
  End end{mpirun.exit_code(), mpirun.end_signal(), mpirun.failure(), board.states(), stopped_};
  find_first_failure(end);
  return end;
}

// Of ranks that fail together mpirun tells any, if any, and the code of one.
void Launcher::find_first_failure(End& end) {
  if (end.code == 0 || (end.failure && end.failure->signal != 0)) return;
  const RankState* first = nullptr;
  for (const RankState& state : end.states)
    if (state.failure && (!first || state.entered_ns < first->entered_ns)) first = &state;
  if (!first) return;
  end.failure = RankFailure{.rank = first->rank, .code = *first->failure, .host = ""};
  if (end.code < kAbove) end.code = *first->failure;
}

// Which rank, how, and where it was.
std::string Launcher::failure_text(const End& end) const {
  if (is_hung(end.states)) return hang_text(end.states, end.stopped);
  if (!end.failure)
    return end.signal != 0 ? fmt::format("mpirun was ended by {}", signal_name(end.signal))
                           : fmt::format("mpirun ended with exit code {}", end.code);
  const RankFailure& failure = *end.failure;
  std::string text = fmt::format("rank {}", failure.rank);
  if (!failure.host.empty()) text += fmt::format(" on host {}", failure.host);
  text += failure.signal != 0 ? fmt::format(" was ended by {}", signal_name(failure.signal))
                              : fmt::format(" ended with exit code {}", failure.code);
  for (const RankState& state : end.states)
    if (state.rank == failure.rank)
      text += fmt::format(" in step {}, {}", state.step, phase_text(state.phase));
  if (failure.signal == SIGKILL) text += "; the kernel does so where memory runs out";
  return text;
}

int Launcher::exit_code_after_leaving(const End& end) const {
  if (end.code == static_cast<int>(ExitCode::ok) ||
      end.code == static_cast<int>(ExitCode::preempted))
    return end.code;
  if (is_interrupted_) return kAbove + SIGINT;
  // A rank that had no time to prepare for the signal has nothing to save either.
  const bool died_of_it = end.signal == SIGUSR2 || (end.failure && end.failure->signal == SIGUSR2);
  if (died_of_it && leaving_ == Leaving::asked) return static_cast<int>(ExitCode::preempted);
  if (leaving_ == Leaving::asked || leaving_ == Leaving::wanted)
    log_error("{}, while it was asked to leave", failure_text(end));
  return leaving_ == Leaving::asked ? own_code(end) : static_cast<int>(ExitCode::failure);
}

// So that a port or a GPU that is in use for a moment does not cost a restart.
void Launcher::pause() {
  const double until = now_s() + job_.times.pause_s;
  while (now_s() < until && leaving_ == Leaving::no) {
    ::usleep(static_cast<useconds_t>(1e6 * std::min(kTick, job_.times.pause_s)));
    while (const int signal = signals_.next())
      if (signal != SIGCHLD && signal != SIGUSR1) {
        leaving_ = Leaving::wanted;
        log_info("{}: the ranks are not started again", signal_name(signal));
      }
  }
}

int Launcher::run() {
  const std::vector<CheckpointMark> at_start = mark_checkpoints(job_.checkpoints_folder);
  RestartPolicy policy(job_.max_restarts, at_start);
  std::optional<std::string> resume;
  while (true) {
    const End end = attempt(resume);
    if (leaving_ != Leaving::no) return exit_code_after_leaving(end);
    const std::vector<CheckpointMark> now = mark_checkpoints(job_.checkpoints_folder);
    // Something that is called mpirun may end without an error and have started nothing. Ranks that
    // do not train do not tell.
    const bool trains = !job_.checkpoints_folder.empty();
    const bool did_nothing = trains && !has_started(end) && now == at_start;
    if (end.code < kAbove && !is_restartable(end.code) && !did_nothing) return end.code;
    log_error("{}", failure_text(end));
    const int code = end.code == 0 ? static_cast<int>(ExitCode::failure) : own_code(end);
    if (!has_started(end)) {
      log_error("no rank has come as far as its first line of work; it is not tried again");
      return code;
    }
    const RestartPolicy::Decision next = policy.after_failure(now);
    if (!next.restarts) {
      log_error("{}", next.sentence);
      return code;
    }
    log_warning("{}", next.sentence);
    resume = next.resume;
    pause();
    if (leaving_ != Leaving::no) return static_cast<int>(ExitCode::preempted);
  }
}

}  // namespace

int run_launcher(const LaunchJob& job) {
  return Launcher(job).run();
}

}  // namespace dstrain
