// Jobs of two ranks from outside: the program starts its ranks, and what kills, stops and signals
// do to them. What a job has computed in the end must not depend on any of it.
#include <fmt/format.h>
#include <signal.h>

#include <fstream>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "test/support/pty.h"
#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;

// Long enough to be hit in the middle.
const std::vector<std::string> kTwoRanks = {"launch.ranks=2", "train.steps=300",
                                            "train.eval_every=100", "checkpoint.every=20"};

// Until it is told to leave.
const std::vector<std::string> kTwoRanksWithoutEnd = {"launch.ranks=2", "train.steps=100000",
                                                      "train.eval_every=0", "checkpoint.every=0"};

int64_t num_saves(const TinyJob& job) {
  return std::ssize(events(job, "checkpoint"));
}

void require_steps(RunningProgram& program, const TinyJob& job, int64_t more) {
  const int64_t wanted = last_step(job) + more;
  REQUIRE(program.wait_until([&] { return last_step(job) >= wanted; }));
}

std::vector<pid_t> children_of(pid_t pid) {
  std::ifstream file(fmt::format("/proc/{0}/task/{0}/children", pid));
  std::vector<pid_t> children;
  for (pid_t child; file >> child;) children.push_back(child);
  return children;
}

// In the order of the ranks, as mpirun starts them one after the other.
std::vector<pid_t> ranks_of(const RunningProgram& launcher) {
  const std::vector<pid_t> mpirun = children_of(launcher.pid());
  return mpirun.empty() ? std::vector<pid_t>() : children_of(mpirun.front());
}

int64_t count(const std::string& text, const std::string& part) {
  int64_t n = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++n;
  return n;
}

// The same job, never disturbed.
const RunTrace& undisturbed() {
  static const RunTrace trace = [] {
    const TinyJob job(kTwoRanks);
    job.must_train();
    return trace_of(job);
  }();
  return trace;
}

}  // namespace

TEST_CASE("launch: a killed rank costs the steps since the checkpoint and nothing else",
          "[launch][job]") {
  constexpr uint64_t kSeed = 4401;
  const TinyJob job(joined(kTwoRanks, {"launch.max_restarts=9"}));
  RunningProgram program(job.launch());
  for (uint64_t i = 0; i < 2; ++i) {
    // Each time a checkpoint further, or the job would count as unable to go on.
    const auto wanted = static_cast<int64_t>(25 + 100 * i + 70 * random_uniform(kSeed, 0, i));
    CAPTURE(kSeed, i, wanted);
    REQUIRE(program.wait_until([&] { return last_step(job) >= wanted; }));
    const std::vector<pid_t> ranks = ranks_of(program);
    REQUIRE(ranks.size() == 2);
    REQUIRE(::kill(ranks[i % 2], SIGKILL) == 0);
    const std::string restarted = fmt::format("(restart {} of 9)", i + 1);
    REQUIRE(program.wait_until([&] { return count(program.err(), restarted) == 1; }));
    REQUIRE(program.wait_until([&] { return ranks_of(program).size() == 2; }));
  }
  const Finished end = program.wait();
  INFO(end.err);
  REQUIRE(end.code == 0);
  CHECK(count(end.err, " was ended by SIGKILL in step ") == 2);
  CHECK(difference(undisturbed(), trace_of(job)) == "");
  CHECK(job.damage() == "");
}

TEST_CASE("launch: SIGTERM saves the step under way and leaves", "[launch][job]") {
  const TinyJob job(kTwoRanks);
  RunningProgram program(job.launch());
  REQUIRE(program.wait_until([&] { return last_step(job) >= 50; }));
  program.send(SIGTERM);
  const Finished end = program.wait();
  INFO(end.err);
  REQUIRE(end.code == static_cast<int>(ExitCode::preempted));
  CHECK(job.saved_steps().back() == last_step(job));
  CHECK(last_step(job) < 300);
  job.must_train({"--resume", "latest"});
  CHECK(difference(undisturbed(), trace_of(job)) == "");
}

TEST_CASE("launch: SIGUSR1 saves and training goes on", "[launch][job]") {
  const TinyJob job(kTwoRanksWithoutEnd);
  RunningProgram program(job.launch());
  require_steps(program, job, 20);
  program.send(SIGUSR1);
  REQUIRE(program.wait_until([&] { return num_saves(job) == 1; }));
  require_steps(program, job, 20);
  program.send(SIGTERM);
  const Finished end = program.wait();
  INFO(end.err);
  REQUIRE(end.code == static_cast<int>(ExitCode::preempted));
  CHECK(num_saves(job) == 2);  // that one and the last
}

// The ranks of a job do not get its signal at the same step. Two saves would come of it if each
// rank's counted.
TEST_CASE("launch: of the ranks' SIGUSR1 the first rank's counts", "[launch][job]") {
  const TinyJob job(kTwoRanksWithoutEnd);
  RunningProgram program(job.launch());
  require_steps(program, job, 5);
  const std::vector<pid_t> ranks = ranks_of(program);
  REQUIRE(ranks.size() == 2);
  REQUIRE(::kill(ranks[1], SIGUSR1) == 0);
  require_steps(program, job, 20);
  REQUIRE(::kill(ranks[0], SIGUSR1) == 0);
  REQUIRE(program.wait_until([&] { return num_saves(job) == 1; }));
  require_steps(program, job, 20);
  REQUIRE(::kill(ranks[1], SIGUSR1) == 0);
  require_steps(program, job, 20);
  program.send(SIGTERM);
  const Finished end = program.wait();
  INFO(end.err);
  REQUIRE(end.code == static_cast<int>(ExitCode::preempted));
  CHECK(num_saves(job) == 2);
}

TEST_CASE("launch: a stopped rank is found, and the job goes on without it", "[launch][job]") {
  const TinyJob job(joined(kTwoRanks, {"launch.hang_timeout=2"}));
  RunningProgram program(job.launch());
  REQUIRE(program.wait_until([&] { return last_step(job) >= 50; }));
  const std::vector<pid_t> ranks = ranks_of(program);
  REQUIRE(ranks.size() == 2);
  REQUIRE(::kill(ranks[1], SIGSTOP) == 0);
  const Finished end = program.wait();
  INFO(end.err);
  REQUIRE(end.code == 0);
  CHECK_THAT(end.err, Contains("no progress within launch.hang_timeout (2 s)") &&
                          Contains("error: the job hung; rank") &&
                          Contains("; stopped, as by SIGSTOP or a debugger: rank 1\n"));
  CHECK(difference(undisturbed(), trace_of(job)) == "");
}

TEST_CASE("launch: a fault that every rank meets is told once", "[launch][job]") {
  const TinyJob job(joined(kTwoRanks, {"data.train[0].path=nothing-here"}));
  const Finished end = job.train();
  INFO(end.err);
  CHECK(end.code == static_cast<int>(ExitCode::no_input));
  CHECK(count(end.err, "nothing-here") == 2);  // in the command and in the error
  CHECK(count(end.err, "error: ") == 1);
  CHECK(count(end.err, "starting ") == 1);
}

TEST_CASE("launch: ranks report how long communication held up each step", "[launch][job]") {
  const TinyJob two({"launch.ranks=2", "train.steps=5"}), one({"launch.ranks=1", "train.steps=5"});
  const Finished end = two.must_train();
  CHECK_THAT(end.err, Contains("  communication  held up computing for "));
  const std::vector<std::string> steps = events(two, "step");
  REQUIRE(steps.size() == 5);
  for (const std::string& line : steps) {
    CAPTURE(line);
    const auto ms = [&](const char* key) { return std::stod(json_field(line, key)); };
    CHECK(ms("exposed_ms") < ms("step_ms"));
    for (const char* part : {"exposed_gradients_ms", "exposed_results_ms"}) {
      CHECK(ms(part) > 0);
      CHECK(ms(part) < ms("exposed_ms"));
    }
  }
  CHECK_THAT(one.must_train().err, !Contains("communication"));
  for (const std::string& line : events(one, "step")) CHECK(json_field(line, "exposed_ms") == "");
}

#ifdef DSTRAIN_FAILPOINTS

TEST_CASE("launch: each save says how long the ranks waited for it", "[launch][job]") {
  const TinyJob job(
      {"launch.ranks=2", "train.steps=8", "train.eval_every=0", "checkpoint.every=4"});
  Launch launch = job.launch();
  launch.failpoint = "save.after_shard_close@1=sleep:800";  // of step 4; step 8 waits for it
  RunningProgram program(launch);
  const Finished end = program.wait();
  INFO(end.err);
  REQUIRE(end.code == 0);
  const std::vector<std::string> saves = events(job, "checkpoint");
  REQUIRE(saves.size() == 2);
  CAPTURE(saves[0], saves[1]);
  CHECK(std::stod(json_field(saves[0], "stall_ms")) < 300);
  CHECK(std::stod(json_field(saves[1], "stall_ms")) > 300);
}

#endif

TEST_CASE("launch: on a terminal rank 0 has its live line", "[launch][job]") {
  Pty pty(90);
  const TinyJob job(kTwoRanks);
  Launch launch = job.launch();
  launch.stderr_fd = pty.fd();
  RunningProgram program(launch);
  std::string screen;
  program.wait_until([&] {
    screen += pty.read();
    return false;
  });
  CHECK(program.wait().code == 0);
  screen += pty.read();
  CHECK_THAT(screen, Contains("-x DSTRAIN_COLUMNS=90 ") && Contains("\r\033[Kstep "));
}

}  // namespace dstrain::test
