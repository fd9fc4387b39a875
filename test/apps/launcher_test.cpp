// The launcher with an mpirun that is a script, and with the real one: signals, exit codes,
// restarts, output, and that nothing is left behind. The ranks are shell scripts.
#include "apps/launcher.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "apps/launch_machine.h"
#include "core/base/error.h"
#include "core/base/log.h"
#include "core/base/progress.h"
#include "test/support/pty.h"
#include "test/support/run_program.h"

namespace dstrain::test {
namespace {

using Catch::Contains;
namespace fs = std::filesystem;

// A rank's shell: come() takes its slot of the board, as RankProcess does.
const std::string kRank = R"sh(#!/bin/bash
rank=${OMPI_COMM_WORLD_RANK:-0}
slot() { printf "$(printf '\\x%x' $(($2 & 255)) $(($2 >> 8 & 255)) $(($2 >> 16)) 0)" |
  dd of="$DSTRAIN_RANK_BOARD" bs=4 seek=$((32 * rank + $1)) \
    oflag=seek_bytes conv=notrunc status=none; }
come() { slot 4 $rank; slot 16 ${1:-0}; slot 0 $$; echo $$ >>pids; echo $PPID >>mpiruns; }
)sh";

// An mpirun that runs one rank and looks after it as the real one does.
const std::string kFakeMpirun = R"sh(#!/bin/bash
if [[ $1 == --version ]]; then echo "mpirun (Open MPI) 4.1.4"; exit; fi
echo "$*" >>calls
while [[ $1 == -* ]]; do
  case $1 in
    -x) export "$2"; shift 2 ;;
    --mca) shift 3 ;;
    --oversubscribe) shift ;;
    *) shift 2 ;;
  esac
done
"$@" & rank=$!
trap 'kill -USR1 $rank' USR1
trap 'kill -USR2 $rank' USR2
trap 'kill $rank; exit 1' TERM
while true; do
  wait $rank; code=$?
  kill -0 $rank 2>/dev/null || break
done
exit $code
)sh";

void write_script(const std::string& path, const std::string& text) {
  write_file(path, text);
  REQUIRE(::chmod(path.c_str(), 0755) == 0);
}

bool is_alive(pid_t pid) {
  const std::string stat = read_file(fmt::format("/proc/{}/stat", pid));
  const size_t name_end = stat.rfind(')');
  return name_end != std::string::npos && stat.size() > name_end + 2 && stat[name_end + 2] != 'Z';
}

// run_launcher() in a process of its own, whose working folder is a temporary one.
class LaunchedJob {
 public:
  explicit LaunchedJob(const std::string& rank_script, bool has_real_mpirun = false) {
    write_script(folder_ / "rank", kRank + rank_script);
    write_script(folder_ / "mpirun", kFakeMpirun);
    job.plan.mpirun = {"mpirun", folder_ / "mpirun", 4};
    if (has_real_mpirun) job.plan.mpirun = find_mpirun(::getenv, "this test");
    job.plan.machine = look_at_machine(::getenv);
    job.plan.machine.is_container = true;
    job.plan.machine.cores = 64;
    job.plan.hosts = {{"", has_real_mpirun ? 2 : 1}};
    job.plan.program = folder_ / "rank";
    job.checkpoints_folder = folder_ / "checkpoints";
    job.max_restarts = 3;
    job.temporary_folders = {folder_.path()};
    job.times = {.grace_s = 20, .end_s = 5, .ready_s = 20, .pause_s = 0.05};
  }
  ~LaunchedJob() {
    if (pid_ > 0 && !status_) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    for (const pid_t pid : ranks())
      if (is_alive(pid)) ::kill(pid, SIGKILL);  // a test has failed
  }
  LaunchedJob(const LaunchedJob&) = delete;
  LaunchedJob& operator=(const LaunchedJob&) = delete;

  LaunchJob job;
  int stderr_fd = -1;  // a file where not set
  bool ignores_hangup = false;
  bool has_other_thread = false;  // blocks no signal, as those of CUDA, and is quick

  std::string operator/(const std::string& name) const { return folder_ / name; }
  std::string read(const std::string& name) const { return read_file(folder_ / name); }
  pid_t pid() const { return pid_; }

  void make_mpirun_stubborn() { change_mpirun("trap 'kill $rank; exit 1' TERM", "trap '' TERM"); }
  // It does not notice that its rank has ended.
  void make_mpirun_stay(bool is_stubborn) {
    change_mpirun("exit $code", std::string(is_stubborn ? "trap '' TERM\n" : "") +
                                    "while true; do sleep 0.05; done");
  }
  // It ends a second after its rank and breaks if it is asked to meanwhile, as Open MPI's does.
  void make_mpirun_slow_to_end() {
    change_mpirun("exit $code",
                  "trap 'echo broken >>said; exit 139' TERM\nsleep 1 & wait; exit $code");
  }

  void start() {
    std::fflush(nullptr);
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    REQUIRE(pid_ >= 0);
    if (pid_ > 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(126);
    for (int signal = 1; signal < NSIG; ++signal) ::signal(signal, SIG_DFL);
    ::signal(SIGPIPE, SIG_IGN);  // as in main()
    if (ignores_hangup) ::signal(SIGHUP, SIG_IGN);
    if (::chdir(folder_.path().c_str()) != 0) ::_exit(125);
    FILE* out = std::freopen("out", "w", stdout);
    FILE* err = std::freopen("err", "w", stderr);
    if (out == nullptr || err == nullptr) ::_exit(124);
    if (stderr_fd >= 0) ::dup2(stderr_fd, 2);
    init_log({});
    if (has_other_thread)
      std::thread([] {
        for (std::atomic<int> turns = 0;; ++turns) {
        }
      }).detach();
    try {
      ::_exit(run_launcher(job));
    } catch (const Error& e) {
      log_error("{}", e.what());
      ::_exit(static_cast<int>(e.code()));
    }
  }

  void send(int signal) const { REQUIRE(::kill(pid_, signal) == 0); }

  // Fails the test after a while.
  void wait_until(const std::function<bool()>& condition, double deadline = 20) const {
    const double begin = monotonic_seconds();
    while (!condition()) {
      if (monotonic_seconds() - begin > deadline)
        FAIL("what the test waits for did not happen; the launcher wrote:\n" << read("err"));
      sleep_ms(2);
    }
  }
  void wait_for(const std::string& file, const std::string& text) const {
    wait_until([&] { return read(file).find(text) != std::string::npos; });
  }

  // The exit code, or 1000 + the signal that ended the launcher.
  int wait() {
    wait_until([this] {
      int status = 0;
      if (!status_ && ::waitpid(pid_, &status, WNOHANG) == pid_) status_ = status;
      return status_.has_value();
    });
    return WIFEXITED(*status_) ? WEXITSTATUS(*status_) : 1000 + WTERMSIG(*status_);
  }
  int run() {
    start();
    return wait();
  }

  // Of the ranks that came, and of the mpiruns that started them.
  std::vector<pid_t> ranks() const { return pids_in("pids"); }
  std::vector<pid_t> mpiruns() const { return pids_in("mpiruns"); }
  void all_ranks_gone() const {
    for (const pid_t pid : ranks()) wait_until([pid] { return !is_alive(pid); });
  }
  void all_gone() const {
    all_ranks_gone();
    for (const pid_t pid : mpiruns()) wait_until([pid] { return !is_alive(pid); });
  }
  std::vector<std::string> leftovers() const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(folder_.path())) {
      const std::string name = entry.path().filename();
      if (name.starts_with("dstrain-launch-")) found.push_back(name);
    }
    return found;
  }
  int64_t calls() const {
    const std::string text = read("calls");
    return std::count(text.begin(), text.end(), '\n');
  }

 private:
  void change_mpirun(const std::string& from, const std::string& to) {
    std::string text = kFakeMpirun;
    const size_t at = text.find(from);
    REQUIRE(at != std::string::npos);
    write_script(folder_ / "mpirun", text.replace(at, from.size(), to));
  }
  std::vector<pid_t> pids_in(const std::string& name) const {
    std::ifstream file(folder_ / name);
    std::vector<pid_t> pids;
    for (pid_t pid; file >> pid;) pids.push_back(pid);
    return pids;
  }

  TempFolder folder_;
  pid_t pid_ = -1;
  std::optional<int> status_;
};

const std::string kSaveAndLeave = R"sh(
trap 'echo saved >>said' USR1
trap 'echo left >>said; exit 75' USR2
come
while true; do sleep 0.02; done
)sh";

// A line of a rank's script: makes a checkpoint folder of that step.
std::string save(const std::string& step) {
  return fmt::format("mkdir -p checkpoints/step-$(printf %08d {})\n", step);
}

}  // namespace

TEST_CASE("launcher: ranks get the words, their output and exit codes pass through", "[launcher]") {
  LaunchedJob job("come\necho result; echo \"words $*\" >&2; exit 0\n");
  job.job.words = {"--config", "a b.yaml"};
  CHECK(job.run() == 0);
  CHECK(job.read("out") == "result\n");
  CHECK_THAT(job.read("err"), Contains("words --config a b.yaml\n"));
  CHECK_THAT(job.read("err"),
             Contains("starting 1 rank: mpirun -np 1 ") && Contains(" --config 'a b.yaml'\n"));
  CHECK(job.leftovers().empty());
}

TEST_CASE("launcher: what cannot end better is not started again", "[launcher]") {
  const int code = GENERATE(0, 2, 65, 66, 75, 77, 78);
  CAPTURE(code);
  LaunchedJob job(fmt::format("come\nexit {}\n", code));
  CHECK(job.run() == code);
  CHECK(job.calls() == 1);
}

TEST_CASE("launcher: a failure is started again from the newest checkpoint", "[launcher]") {
  const int code = GENERATE(1, 74);
  CAPTURE(code);
  LaunchedJob job("come 7\nn=$(wc -l <calls)\n" + save("${n}0") +
                  fmt::format("[[ $n -ge 3 ]] || exit {}\n", code));
  job.job.words = {"--config", "job.yaml", "--overwrite"};
  CHECK(job.run() == 0);
  CHECK(job.calls() == 3);
  std::ifstream calls(job / "calls");
  std::string first, second;
  std::getline(calls, first);
  std::getline(calls, second);
  CHECK_THAT(first, Catch::EndsWith(" --config job.yaml --overwrite"));
  CHECK_THAT(second, Catch::EndsWith(" --config job.yaml --resume latest"));
  CHECK_THAT(job.read("err"),
             Contains(fmt::format("error: mpirun ended with exit code {}", code)) &&
                 Contains("starting again from step 10 (restart 1 of 3)") &&
                 Contains("starting again from step 20 (restart 2 of 3)"));
}

TEST_CASE("launcher: the end is noticed where another thread takes the signal that tells it",
          "[launcher]") {
  for (int i = 0; i < 5; ++i) {  // who comes first is left to chance
    LaunchedJob job("come\nexit 66\n");
    job.has_other_thread = true;
    CHECK(job.run() == 66);
  }
}

TEST_CASE("launcher: the number of restarts is limited", "[launcher]") {
  LaunchedJob job("come\n" + save("$(wc -l <calls)") + "exit 74\n");
  job.job.max_restarts = 2;
  CHECK(job.run() == 74);
  CHECK(job.calls() == 3);
  CHECK_THAT(job.read("err"), Contains("started again 2 times (launch.max_restarts)"));
}

TEST_CASE("launcher: a job that fails where it failed before is given up", "[launcher]") {
  LaunchedJob job("come\n" + save("30") + "exit 1\n");
  job.job.max_restarts = 100;
  CHECK(job.run() == 1);
  CHECK(job.calls() == 3);
  CHECK_THAT(job.read("err"), Contains("failed 3 times without a checkpoint newer than step 30"));
}

TEST_CASE("launcher: ranks that never came are not started again", "[launcher]") {
  LaunchedJob job("exit 1\n");
  CHECK(job.run() == 1);
  CHECK(job.calls() == 1);
  CHECK_THAT(job.read("err"), Contains("no rank has come as far"));
}

TEST_CASE("launcher: an mpirun that starts nothing has not trained", "[launcher]") {
  LaunchedJob job("come\n");
  write_script(job / "mpirun", "#!/bin/sh\nexit 0\n");
  CHECK(job.run() == 1);
  CHECK_THAT(job.read("err"), Contains("error: mpirun ended with exit code 0\n") &&
                                  Contains("no rank has come as far"));
}

TEST_CASE("launcher: an mpirun that stays when its ranks have gone is ended", "[launcher]") {
  const bool is_stubborn = GENERATE(false, true);
  CAPTURE(is_stubborn);
  LaunchedJob job("come\n[[ $(wc -l <calls) -ge 2 ]] && exit 0\nexit 1\n");
  job.make_mpirun_stay(is_stubborn);
  job.job.times.hung_s = 0.2;
  job.job.times.end_s = 0.3;
  job.job.max_restarts = 1;
  CHECK(job.run() == 1);
  CHECK(job.calls() == 2);
  CHECK_THAT(job.read("err"), Contains("does not end, although its ranks have; it is ended") &&
                                  Contains("starting again from where it began"));
  job.all_gone();
}

TEST_CASE("launcher: SIGUSR1 saves, each signal to leave saves and leaves", "[launcher]") {
  const int signal = GENERATE(SIGTERM, SIGINT, SIGHUP, SIGUSR2);
  CAPTURE(signal);
  LaunchedJob job(kSaveAndLeave);
  job.start();
  job.wait_until([&] { return job.ranks().size() == 1; });
  job.send(SIGUSR1);
  job.wait_for("said", "saved\n");
  job.send(signal);
  CHECK(job.wait() == 75);
  CHECK(job.read("said") == "saved\nleft\n");
  CHECK(job.calls() == 1);
  job.all_gone();
  CHECK(job.leftovers().empty());
}

TEST_CASE("launcher: SIGHUP stays ignored where it was, as under nohup", "[launcher]") {
  LaunchedJob job(kSaveAndLeave);
  job.ignores_hangup = true;
  job.start();
  job.wait_until([&] { return job.ranks().size() == 1; });
  job.send(SIGHUP);
  job.send(SIGUSR1);
  job.wait_for("said", "saved\n");
  job.send(SIGTERM);
  CHECK(job.wait() == 75);
  CHECK_THAT(job.read("err"), !Contains("SIGHUP"));
}

TEST_CASE("launcher: a signal while the ranks start waits for them", "[launcher]") {
  LaunchedJob job("sleep 0.5" + kSaveAndLeave);
  job.start();
  job.wait_until([&] { return job.calls() == 1; });
  job.send(SIGUSR1);
  job.send(SIGTERM);
  CHECK(job.wait() == 75);
  CHECK_THAT(job.read("said"), Contains("left\n"));
}

TEST_CASE("launcher: ranks that do not leave are ended after the grace period", "[launcher]") {
  LaunchedJob job("trap '' USR2\ncome\nwhile true; do sleep 0.02; done\n");
  job.job.times.grace_s = 0.3;
  job.start();
  job.wait_until([&] { return job.ranks().size() == 1; });
  job.send(SIGTERM);
  CHECK(job.wait() == 1);
  CHECK_THAT(job.read("err"), Contains("did not leave within 0.3 s"));
  job.all_gone();
}

TEST_CASE("launcher: an mpirun that does not end either is killed with its ranks", "[launcher]") {
  LaunchedJob job("trap '' USR2 TERM\ncome\nwhile true; do sleep 0.02; done\n");
  job.make_mpirun_stubborn();
  job.job.times.grace_s = 0.2;
  job.job.times.end_s = 0.2;
  job.start();
  job.wait_until([&] { return job.ranks().size() == 1; });
  job.send(SIGTERM);
  CHECK(job.wait() == 1);
  job.all_gone();
}

TEST_CASE("launcher: a second Ctrl-C ends the ranks at once", "[launcher]") {
  LaunchedJob job("trap '' USR2\ncome\nwhile true; do sleep 0.02; done\n");
  job.start();
  job.wait_until([&] { return job.ranks().size() == 1; });
  job.send(SIGINT);
  job.wait_for("err", "a second Ctrl-C ends them at once");
  job.send(SIGINT);
  CHECK(job.wait() == 128 + SIGINT);
  job.all_gone();
}

TEST_CASE("launcher: a second Ctrl-C after the ranks have saved and left is not sent to mpirun",
          "[launcher]") {
  LaunchedJob job(kSaveAndLeave);
  job.make_mpirun_slow_to_end();
  job.start();
  job.wait_until([&] { return job.ranks().size() == 1; });
  job.send(SIGINT);
  job.wait_for("said", "left\n");
  job.all_ranks_gone();
  job.send(SIGINT);
  CHECK(job.wait() == 75);
  CHECK(job.read("said") == "left\n");
}

TEST_CASE("launcher: killing it ends mpirun and the ranks", "[launcher]") {
  const bool is_real = GENERATE(false, true);
  CAPTURE(is_real);
  LaunchedJob job(kSaveAndLeave, is_real);
  job.start();
  job.wait_until([&] { return job.ranks().size() == (is_real ? 2u : 1u); });
  job.send(SIGKILL);
  CHECK(job.wait() == 1000 + SIGKILL);
  job.all_gone();
}

TEST_CASE("launcher: killing mpirun ends the ranks and starts them again", "[launcher]") {
  LaunchedJob job("come\n[[ $(wc -l <calls) -ge 2 ]] && exit 0\n" + save("5") +
                  "kill -9 $PPID\nwhile true; do sleep 0.02; done\n");
  CHECK(job.run() == 0);
  CHECK_THAT(job.read("err"), Contains("mpirun was ended by SIGKILL") &&
                                  Contains("starting again from step 5 (restart 1 of 3)"));
  job.all_gone();
}

TEST_CASE("launcher: the live line of rank 0 arrives as it is, ours on lines of their own",
          "[launcher]") {
  Pty pty(100);
  LaunchedJob job("come\nprintf 'step 1 of 9' >&2\nsleep 0.3\nexit 1\n");
  job.job.plan.columns = 100;
  job.job.max_restarts = 0;
  job.stderr_fd = pty.fd();
  CHECK(job.run() == 1);
  const std::string screen = pty.read();
  CHECK_THAT(screen, Contains("-x DSTRAIN_COLUMNS=100 "));
  CHECK_THAT(screen, Contains("\nstep 1 of 9\r\033[Kerror: mpirun ended with exit code 1\r\n"));
}

TEST_CASE("launcher: a closed reader does not end the job", "[launcher]") {
  int fds[2];
  REQUIRE(::pipe(fds) == 0);
  LaunchedJob job("come\nfor i in {1..200}; do echo line $i >&2; done\ntouch done\nexit 0\n");
  job.stderr_fd = fds[1];
  ::close(fds[0]);
  job.start();
  ::close(fds[1]);
  CHECK(job.wait() == 0);
  CHECK(fs::exists(job / "done"));
}

TEST_CASE("launcher: with the real mpirun, results pass and nothing stays behind", "[launcher]") {
  LaunchedJob job("come\necho out $rank\necho err $rank >&2\n", true);
  CHECK(job.run() == 0);
  CHECK_THAT(job.read("out"), Contains("out 0\n") && Contains("out 1\n"));
  CHECK_THAT(job.read("err"), Contains("err 0\n") && Contains("err 1\n"));
  CHECK(job.leftovers().empty());
}

TEST_CASE("launcher: with the real mpirun, the rank that failed is named", "[launcher]") {
  const auto [act, code, text] = GENERATE(table<std::string, int, std::string>(
      {{"exit 65", 65, ""},
       {"exit 1", 1, "error: rank 1 ended with exit code 1 in step 12, starting"},
       {"kill -SEGV $$", 1, " was ended by SIGSEGV in step 12, starting"}}));
  CAPTURE(act, code);
  LaunchedJob job("come 12\n[[ $rank == 1 ]] && " + act + "\nsleep 20\n", true);
  job.job.max_restarts = 0;
  CHECK(job.run() == code);
  CHECK_THAT(job.read("err"), Contains(text));
  // None of mpirun's own words about it.
  CHECK_THAT(job.read("err"), !Contains("-----") && !Contains("Primary job"));
  job.all_gone();
  CHECK(job.leftovers().empty());
}

TEST_CASE("launcher: of ranks that end together, the one that failed by itself is named",
          "[launcher]") {
  // Rank 1 fails with 65, which rank 0 notices and leaves first.
  LaunchedJob job(R"sh(
come 12
if [[ $rank == 1 ]]; then slot 12 $((256 + 65)); touch failed; sleep 0.5; exit 65; fi
while [[ ! -e failed ]]; do sleep 0.02; done
exit 1
)sh",
                  true);
  CHECK(job.run() == 65);
  CHECK(job.calls() == 0);  // what the fake mpirun counts; and none is started again
  CHECK_THAT(job.read("err"), !Contains("starting again"));

  LaunchedJob again("come 12\nslot 12 $((256 + 74))\nexit 1\n");
  again.job.max_restarts = 0;
  CHECK(again.run() == 74);
  CHECK_THAT(again.read("err"), Contains("error: rank 0 ended with exit code 74 in step 12, "));
}

TEST_CASE("launcher: a hang is told with what the others waited for first", "[launcher]") {
  LaunchedJob job(R"sh(
come 12
if [[ $rank == 0 ]]; then slot 8 2; slot 12 0; sleep 20; fi
slot 8 3; sleep 0.3; slot 12 1; exit 1
)sh",
                  true);
  job.job.plan.hosts = {{"", 3}};
  job.job.max_restarts = 0;
  CHECK(job.run() == 1);
  const std::string text = job.read("err");
  const size_t at = text.find("error: the job hung; rank 0: step 12, in forward or backward for ");
  REQUIRE(at != std::string::npos);
  CHECK_THAT(text.substr(at), Contains("; ranks 1, 2: step 12, summing gradients for "));
}

TEST_CASE("launcher: of a hang, the rank that is stopped is named", "[launcher]") {
  LaunchedJob job(R"sh(
come 12
slot 8 3
if [[ $rank == 1 ]]; then touch stops; kill -STOP $$; fi
while [[ ! -e stops ]]; do sleep 0.02; done
sleep 0.3; slot 12 1; sleep 0.6; exit 1
)sh",
                  true);
  job.job.max_restarts = 0;
  CHECK(job.run() == 1);
  CHECK_THAT(job.read("err"),
             Contains("error: the job hung; ranks 0, 1: step 12, summing gradients for ") &&
                 Contains(" s; stopped, as by SIGSTOP or a debugger: rank 1\n"));
}

TEST_CASE("launcher: an mpirun that waits for a hung rank is ended, and the job goes on",
          "[launcher]") {
  const bool is_stubborn = GENERATE(false, true);
  CAPTURE(is_stubborn);
  LaunchedJob job("come 12\n[[ $(wc -l <calls) -ge 2 ]] && exit 0\n" + save("10") +
                  "trap '' TERM\nslot 12 1\nwhile true; do sleep 0.02; done\n");
  if (is_stubborn) job.make_mpirun_stubborn();
  job.job.times.hung_s = 0.2;
  job.job.times.end_s = 0.3;
  CHECK(job.run() == 0);
  CHECK(job.calls() == 2);
  CHECK_THAT(job.read("err"), Contains("a host that cannot be reached") &&
                                  Contains("error: the job hung; rank 0: step 12, ") &&
                                  Contains("starting again from step 10"));
  job.all_gone();
}

TEST_CASE("launcher: with the real mpirun, signals reach every rank", "[launcher]") {
  LaunchedJob job(R"sh(
trap 'echo saved $rank >>said' USR1
trap 'echo left $rank >>said; sleep 0.3; exit 75' USR2
come
while true; do sleep 0.02; done
)sh",
                  true);
  job.start();
  job.wait_until([&] { return job.ranks().size() == 2; });
  job.send(SIGUSR1);
  job.wait_for("said", "saved 0\n");
  job.wait_for("said", "saved 1\n");
  job.send(SIGTERM);
  CHECK(job.wait() == 75);
  CHECK_THAT(job.read("said"), Contains("left 0\n") && Contains("left 1\n"));
  CHECK_THAT(job.read("err"), !Contains("Forwarding"));
  job.all_gone();
  CHECK(job.leftovers().empty());
}

TEST_CASE("launcher: mpirun's own complaints are shown", "[launcher]") {
  LaunchedJob job("come\n", true);
  job.job.plan.program = job / "no-such-program";
  CHECK(job.run() != 0);
  CHECK_THAT(job.read("err"), Contains("no-such-program") && Contains("warning: mpirun: "));
}

}  // namespace dstrain::test
