// Signals and closed streams: what is promised in apps/signals.h, seen from outside.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <utility>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;
namespace fs = std::filesystem;

// Long enough to be hit in the middle: about a second.
const std::vector<std::string> kLong = {"train.steps=400", "train.eval_every=100",
                                        "checkpoint.every=0"};

bool has_step(const TinyJob& job, int64_t step) {
  return last_step(job) >= step;
}

int64_t num_saves(const TinyJob& job) {
  return std::ssize(events(job, "checkpoint"));
}

// A line of /proc/PID/status such as "SigBlk: 0000000000014000".
uint64_t signal_mask(const std::string& status, const std::string& key) {
  const size_t at = status.find(key);
  REQUIRE(at != std::string::npos);
  return std::stoull(status.substr(at + key.size()), nullptr, 16);
}

// The reading end of a pipe that nobody reads any more after `lines` lines.
class ShortReader {
 public:
  ShortReader() { REQUIRE(::pipe2(fds_, O_CLOEXEC) == 0); }
  ~ShortReader() { close_both(); }
  int writing_end() const { return fds_[1]; }
  // As `head -1`: reads a line and closes. To be called after the child has started.
  std::string read_line() {
    ::close(fds_[1]);
    fds_[1] = -1;
    std::string line;
    for (char c; ::read(fds_[0], &c, 1) == 1 && c != '\n';) line += c;
    close_both();
    return line;
  }

 private:
  void close_both() {
    for (int& fd : fds_) {
      if (fd >= 0) ::close(fd);
      fd = -1;
    }
  }
  int fds_[2] = {-1, -1};
};

}  // namespace

TEST_CASE("signals: SIGTERM at random steps saves the current one and loses none", "[signals]") {
  constexpr uint64_t kSeed = 7771;
  const TinyJob whole(kLong);
  whole.must_train();
  const RunTrace expected = trace_of(whole);

  const TinyJob job(kLong);
  int preempted = 0;
  for (uint64_t i = 0; i < 6; ++i) {
    const int64_t wanted =
        last_step(job) + 1 + static_cast<int64_t>(60 * random_uniform(kSeed, 0, i));
    CAPTURE(kSeed, i, wanted);
    RunningProgram program(job.launch({"--resume", "latest"}));
    program.wait_until([&] { return has_step(job, wanted); });
    program.send(SIGTERM);
    const Finished end = program.wait();
    INFO(end.err);
    REQUIRE((end.code == static_cast<int>(ExitCode::preempted) || end.code == 0));
    REQUIRE(job.saved_steps().back() == last_step(job));
    CHECK(job.num_leftovers() == 0);
    if (end.code == 0) break;
    ++preempted;
    CHECK_THAT(end.err, Contains("SIGTERM") && Contains("--resume latest"));
    CHECK(json_field(events(job, "end").back(), "outcome") == "stopped by SIGTERM");
  }
  CHECK(preempted >= 2);
  job.must_train({"--resume", "latest"});
  CHECK(difference(expected, trace_of(job)) == "");
}

TEST_CASE("signals: without the end's save, what a signal stops is saved all the same",
          "[signals]") {
  const TinyJob job(joined(kLong, {"checkpoint.at_end=false"}));
  RunningProgram program(job.launch());
  REQUIRE(program.wait_until([&] { return has_step(job, 3); }));
  program.send(SIGTERM);
  const Finished stopped = program.wait();
  INFO(stopped.err);
  REQUIRE(stopped.code == static_cast<int>(ExitCode::preempted));
  const std::vector<int64_t> saved = {last_step(job)};
  CHECK(job.saved_steps() == saved);
  const Finished end = job.must_train({"--resume", "latest"});
  CHECK(last_step(job) == 400);
  CHECK(job.saved_steps() == saved);
  CHECK_THAT(end.err, Contains("on signals, newest") && !Contains("at the end"));
}

// The kernels that multiply matrices keep the stack pointer in a heap buffer: a handler that ran on
// such a thread would write its frame there.
TEST_CASE("signals: no handler runs on any thread", "[signals]") {
  const TinyJob job(joined(kLong, {"run.threads=2"}));
  RunningProgram program(job.launch());
  REQUIRE(program.wait_until([&] { return has_step(job, 3); }));
  uint64_t awaited = 0;
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2})
    awaited |= uint64_t{1} << (signal - 1);
  int blocking = 0, waiting = 0;
  for (const auto& task : fs::directory_iterator(fmt::format("/proc/{}/task", program.pid()))) {
    const std::string status = read_file(task.path() / "status");
    CAPTURE(status);
    CHECK((signal_mask(status, "SigCgt:") & awaited) == 0);
    const uint64_t blocked = signal_mask(status, "SigBlk:") & awaited;
    CHECK((blocked == awaited || blocked == 0));
    ++(blocked == 0 ? waiting : blocking);
  }
  CHECK(waiting == 1);   // sigwait() lifts the block for its thread while it waits
  CHECK(blocking >= 4);  // two that compute, the reader and the saver
}

TEST_CASE("signals: a thousand SIGUSR1 in the middle of matrix products change no bit",
          "[signals]") {
  const std::vector<std::string> settings = {"train.steps=25",     "checkpoint.every=0",
                                             "checkpoint.keep=1",  "model.hidden_size=128",
                                             "train.eval_every=0", "data.seq_len=128"};
  const TinyJob whole(settings), job(settings);
  whole.must_train();
  RunningProgram program(job.launch());
  int sent = 0;
  program.wait_until([&] {
    if (last_step(job) > 0 || sent > 0) program.send(SIGUSR1), ++sent;
    return !program.is_running();
  });
  const Finished end = program.wait();
  CAPTURE(sent, end.err);
  CHECK(end.code == 0);
  CHECK(sent > 50);
  CHECK(difference(trace_of(whole), trace_of(job)) == "");
}

TEST_CASE("signals: SIGHUP, SIGUSR2 and SIGINT leave as SIGTERM does", "[signals]") {
  const TinyJob whole(kLong), job(kLong);
  whole.must_train();
  for (const auto& [signal, name] :
       {std::pair{SIGHUP, "SIGHUP"}, {SIGUSR2, "SIGUSR2"}, {SIGINT, "SIGINT"}}) {
    CAPTURE(name);
    const int64_t wanted = last_step(job) + 3;
    RunningProgram program(job.launch({"--resume", "latest"}));
    REQUIRE(program.wait_until([&] { return has_step(job, wanted); }));
    program.send(signal);
    const Finished end = program.wait();
    INFO(end.err);
    CHECK(end.code == static_cast<int>(ExitCode::preempted));
    CHECK_THAT(end.err, Contains(std::string("stopped by ") + name));
    CHECK(job.saved_steps().back() == last_step(job));
  }
  job.must_train({"--resume", "latest"});
  CHECK(difference(trace_of(whole), trace_of(job)) == "");
}

TEST_CASE("signals: under nohup the end of the terminal does not stop a run", "[signals]") {
  const TinyJob job({"train.steps=100000", "train.eval_every=0", "checkpoint.every=0"});
  Launch launch = job.launch();
  launch.ignored_signals = {SIGHUP};
  RunningProgram program(launch);
  REQUIRE(program.wait_until([&] { return has_step(job, 3); }));
  program.send(SIGHUP);
  const int64_t later = last_step(job) + 20;
  CHECK(program.wait_until([&] { return has_step(job, later); }));
  program.send(SIGTERM);
  const Finished end = program.wait();
  INFO(end.err);
  CHECK(end.code == static_cast<int>(ExitCode::preempted));
  CHECK_THAT(end.err, Contains("stopped by SIGTERM") && !Contains("SIGHUP"));
}

TEST_CASE("signals: a burst of SIGUSR1 saves once and the run goes on", "[signals]") {
  const TinyJob job({"train.steps=100000", "train.eval_every=0", "checkpoint.every=0"});
  constexpr int kBursts = 5;
  RunningProgram program(job.launch());
  for (int burst = 0; burst < kBursts; ++burst) {
    CAPTURE(burst);
    const int64_t wanted = last_step(job) + 5;
    REQUIRE(program.wait_until([&] { return has_step(job, wanted); }));
    // Stopped meanwhile, so that the burst meets one step.
    program.send(SIGSTOP);
    for (int i = 0; i < 10; ++i) program.send(SIGUSR1);
    program.send(SIGCONT);
    REQUIRE(program.wait_until([&] { return num_saves(job) > burst; }));
  }
  program.send(SIGTERM);
  const Finished end = program.wait();
  INFO(end.err);
  CHECK(end.code == static_cast<int>(ExitCode::preempted));
  CHECK(num_saves(job) == kBursts + 1);  // and the one at the end
  CHECK(job.damage() == "");
}

#ifdef DSTRAIN_FAILPOINTS

TEST_CASE("signals: SIGUSR1 fifty times during a save asks for one more", "[signals]") {
  const TinyJob job({"train.steps=3", "checkpoint.every=0", "checkpoint.async=false"});
  Launch launch = job.launch();
  launch.failpoint =
      "snapshot.before_write@1=sleep:300,save.after_folder@1=sleep:300,save.after_rename@1=sleep:"
      "300";
  launch.args.insert(launch.args.end(), {"--set", "checkpoint.every=1"});
  RunningProgram program(launch);
  REQUIRE(program.wait_until([&] { return job.num_leftovers() == 1; }));  // step 1 is being saved
  for (int i = 0; i < 50; ++i) program.send(SIGUSR1);
  const Finished end = program.wait();
  INFO(end.err);
  CHECK(end.code == 0);
  // Steps 1, 2 and 3: the burst fell together with the save that was due after step 2.
  CHECK(num_saves(job) == 3);
}

TEST_CASE("signals: a second SIGINT leaves at once and loses no committed checkpoint",
          "[signals]") {
  const TinyJob job({"train.steps=400", "checkpoint.every=3", "checkpoint.async=false"});
  Launch launch = job.launch();
  launch.failpoint = "save.after_shard_close@2=sleep:30000";
  RunningProgram program(launch);
  REQUIRE(program.wait_until(
      [&] { return job.num_leftovers() == 1 && job.saved_steps().size() == 1; }));
  program.send(SIGINT);
  sleep_ms(20);
  CHECK(program.is_running());
  program.send(SIGINT);
  const Finished end = program.wait(10);
  CHECK(end.code == 128 + SIGINT);
  CHECK(job.damage() == "");
  CHECK(job.saved_steps() == std::vector<int64_t>{3});
  job.must_train({"--resume", "latest", "--set", "train.steps=5"});
  CHECK(job.num_leftovers() == 0);
}

TEST_CASE("signals: SIGTERM, then SIGKILL while it saves", "[signals][kill]") {
  const TinyJob whole({"train.steps=20", "checkpoint.every=4"}),
      job({"train.steps=20", "checkpoint.every=4"});
  whole.must_train();
  Launch launch = job.launch();
  launch.failpoint = "save.after_shard_create@3=sleep:30000";
  RunningProgram program(launch);
  REQUIRE(program.wait_until(
      [&] { return job.saved_steps().size() == 2 && job.num_leftovers() == 1; }));
  program.send(SIGTERM);
  sleep_ms(20);
  program.send(SIGKILL);
  CHECK(program.wait().signal == SIGKILL);
  CHECK(job.damage() == "");
  job.must_train({"--resume", "latest"});
  CHECK(difference(trace_of(whole), trace_of(job)) == "");
}

#endif

TEST_CASE("signals: SIGTERM during the start", "[signals]") {
  const TinyJob job({"train.steps=30"});
  for (int i = 0; i < 8; ++i) {
    RunningProgram program(job.launch({"--resume", "latest"}));
    sleep_ms(2 * i);
    program.send(SIGTERM);
    const Finished end = program.wait();
    CAPTURE(i, end.err);
    // Before the handlers are there, the signal ends the program, which has done nothing yet.
    CHECK((end.signal == SIGTERM || end.code == 75 || end.code == 0));
    CHECK(job.damage() == "");
  }
  job.must_train({"--resume", "latest"});
  CHECK(last_step(job) == 30);
}

TEST_CASE("streams: a reader of the log that goes away does not end training", "[signals]") {
  const TinyJob job({"train.steps=100"});
  ShortReader reader;
  Launch launch = job.launch();
  launch.stdout_fd = launch.stderr_fd = reader.writing_end();
  RunningProgram program(launch);
  CHECK_THAT(reader.read_line(), Contains("deepseek-train"));
  CHECK(program.wait().code == 0);
  CHECK(last_step(job) == 100);
  CHECK(job.saved_steps().back() == 100);
}

TEST_CASE("streams: results into head -1, into a full disk, and from a closed input", "[signals]") {
  ShortReader reader;
  Launch launch;
  launch.args = {"config", "schema"};
  launch.stdout_fd = reader.writing_end();
  RunningProgram schema(launch);
  CHECK(reader.read_line() == "{");
  CHECK(schema.wait().code == 0);

  const int full = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
  REQUIRE(full >= 0);
  launch.stdout_fd = full;
  const Finished lost = run_program(launch);
  CHECK(lost.code == static_cast<int>(ExitCode::storage));
  CHECK_THAT(lost.err, Contains("standard output"));

  // Training writes no results, so that a full standard output or error is no reason to stop.
  const TinyJob job({"train.steps=8"});
  Launch train = job.launch();
  train.stdout_fd = train.stderr_fd = full;
  CHECK(run_program(train).code == 0);
  CHECK(last_step(job) == 8);
  ::close(full);
}

// The first file that is opened would take the number of a closed one.
TEST_CASE("streams: where they are closed, nothing is printed into files", "[signals]") {
  const TinyJob job({"train.steps=1000000", "train.eval_every=0"});
  Launch train = job.launch();
  std::vector<std::string> words = {"-c", "exec \"$@\" 2>&-", "sh", train.program};
  words.insert(words.end(), train.args.begin(), train.args.end());
  train.program = "/bin/sh";
  train.args = words;
  RunningProgram running(train);
  REQUIRE(running.wait_until([&] { return last_step(job) >= 3; }));
  const std::string holder = read_file(job.run_folder() + "/run.lock");
  CHECK_THAT(holder, Catch::StartsWith("process ") && Contains(", started "));
  CHECK(lines_of(holder).size() == 1);
  running.send(SIGTERM);
  CHECK(running.wait().code == static_cast<int>(ExitCode::preempted));
  CHECK(job.damage() == "");

  // Results that nobody can get are a failure still.
  Launch version = train;
  version.args = {"-c", "exec \"$@\" <&- >&- 2>&-", "sh", DSTRAIN_BINARY, "version"};
  CHECK(run_program(version).code == static_cast<int>(ExitCode::storage));
}

}  // namespace dstrain::test
