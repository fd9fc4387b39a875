// SIGKILL at random moments and at every failpoint. Each time the next start goes on by itself,
// what was committed stays whole, and in the end losses and weights are those of a run never
// killed.
#include <fmt/format.h>

#include <csignal>
#include <iostream>

#include "core/base/rng.h"
#include "core/checkpoint/failpoint.h"
#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;

// With the program's own check, so that the test does not ask the code that it tests.
void check_whole(const TinyJob& job) {
  CHECK(job.damage() == "");
  if (job.saved_steps().empty()) return;
  const Finished verified = run_program({"ckpt", "verify", job.run_folder()});
  INFO(verified.text());
  CHECK(verified.code == 0);
}

void finish(const TinyJob& job, const RunTrace& expected) {
  const Finished finished = job.train({"--resume", "latest"});
  INFO(finished.err);
  REQUIRE(finished.code == 0);
  const RunTrace got = trace_of(job);
  CHECK(difference({expected.steps, {}, expected.state}, {got.steps, {}, got.state}) == "");
  CHECK(job.num_leftovers() == 0);
  check_whole(job);
}

#ifdef DSTRAIN_FAILPOINTS

// Stretches every part of a save, so that a random moment lands in one.
constexpr const char* kSlowSave =
    "snapshot.before_write=sleep:2,save.after_folder=sleep:4,save.after_shard_create=sleep:4,"
    "save.after_shard_close=sleep:4,save.after_manifest_write=sleep:4,save.after_folder_fsync="
    "sleep:4,"
    "save.after_rename=sleep:4,retention.after_rename=sleep:4,remove.after_unlink=sleep:2";

// Names of failpoints that a run passes only when something else happened before.
std::string arranged(std::string_view name) {
  if (name == "save.before_abandon") return "save.before_manifest@1=throw,save.before_abandon=kill";
  return std::string(name) + "=kill";
}

#endif

}  // namespace

#ifdef DSTRAIN_FAILPOINTS

TEST_CASE("kill: twenty SIGKILLs at random moments, most of them inside a save", "[kill]") {
  constexpr uint64_t kSeed = 20240817;
  constexpr int kKills = 20;
  const std::vector<std::string> settings = {"train.steps=60", "checkpoint.every=1",
                                             "checkpoint.keep=2", "train.eval_every=20"};
  const TinyJob whole(settings);
  whole.must_train();
  const RunTrace expected = trace_of(whole);

  const TinyJob job(settings);
  int inside_save = 0, killed = 0;
  int64_t committed = 0;
  for (int i = 0; i < kKills; ++i) {
    Launch launch = job.launch({"--resume", "latest"});
    launch.failpoint = kSlowSave;
    RunningProgram program(launch);
    // Every other one counts from the first step, when the first save is about to begin.
    const bool from_first_step = i % 2 == 1;
    if (from_first_step)
      program.wait_until([&] { return program.err().find("\nstep ") != std::string::npos; });
    const double moment_ms =
        (from_first_step ? 80 : 240) * random_uniform(kSeed, 0, static_cast<uint64_t>(i));
    CAPTURE(kSeed, i, moment_ms);
    sleep_ms(moment_ms);
    program.send(SIGKILL);
    const Finished end = program.wait();
    INFO(end.err);
    REQUIRE((end.signal == SIGKILL || end.code == 0));
    killed += end.signal == SIGKILL;
    inside_save += job.num_leftovers() > 0;
    REQUIRE(job.damage() == "");
    const std::vector<int64_t> saved = job.saved_steps();
    const int64_t newest = saved.empty() ? 0 : saved.back();
    CHECK(newest >= committed);  // what one run committed, the next kill does not take away
    if (committed > 0) CHECK_FALSE(saved.empty());
    committed = newest;
  }
  std::cout << "seed " << kSeed << ": " << killed << " kills, " << inside_save
            << " of them inside a save, newest checkpoint at step " << committed << std::endl;
  CHECK(killed >= 15);
  CHECK(inside_save >= 5);
  finish(job, expected);
}

TEST_CASE("kill: once at every failpoint", "[kill]") {
  const std::vector<std::string> settings = {"train.steps=16", "checkpoint.every=4",
                                             "checkpoint.keep=2"};
  const TinyJob whole(settings);
  whole.must_train();
  const RunTrace expected = trace_of(whole);

  for (const std::string_view name : kFailpointNames) {
    CAPTURE(name);
    const TinyJob job(settings);
    job.must_train({"--set", "train.steps=8"});
    // Going on from step 4 saves step 8 a second time.
    const bool replaces = name == "save.before_replaced_removed";
    Launch launch = job.launch({"--resume", replaces ? job.checkpoint(4) : "latest"});
    launch.failpoint = arranged(name);
    const Finished killed = run_program(launch);
    INFO(killed.err);
    CHECK(killed.signal == SIGKILL);  // the failpoint was reached
    check_whole(job);
    CHECK(job.saved_steps().back() >= 8);
    finish(job, expected);
  }
}

TEST_CASE("kill: a run that was never able to save starts from scratch", "[kill]") {
  const TinyJob whole({"train.steps=6", "checkpoint.every=2"}),
      job({"train.steps=6", "checkpoint.every=2"});
  whole.must_train();
  Launch launch = job.launch();
  launch.failpoint = "save.after_manifest_create=kill";
  CHECK(run_program(launch).signal == SIGKILL);
  CHECK(job.saved_steps().empty());
  CHECK(job.num_leftovers() == 1);
  const Finished again = job.train({"--resume", "latest"});
  CHECK(again.code == 0);
  CHECK_THAT(again.err, Contains("starting from scratch") &&
                            Contains("which a save that did not end left behind"));
  CHECK(difference(trace_of(whole), trace_of(job)) == "");
}

TEST_CASE("kill: the lock of a dead process is taken over with a warning", "[kill][lock]") {
  const TinyJob job({"train.steps=6", "checkpoint.every=2"});
  Launch launch = job.launch();
  launch.failpoint = "save.after_rename@2=kill";
  const Finished killed = run_program(launch);
  CHECK(killed.signal == SIGKILL);
  const Finished again = job.train({"--resume", "latest"});
  INFO(again.err);
  CHECK(again.code == 0);
  CHECK_THAT(again.err, Contains("ended without releasing it"));
  // A clean end leaves nothing to take over.
  CHECK_THAT(job.train({"--resume", "latest"}).err, !Contains("without releasing"));
}

TEST_CASE("failpoint: a malformed DSTRAIN_FAILPOINT is refused", "[kill]") {
  Launch launch = TinyJob().launch({"--dry-run"});
  launch.folder = "";
  launch.args = {"version"};
  launch.failpoint = "nowhere=kill";
  const Finished refused = run_program(launch);
  CHECK(refused.code == 2);
  CHECK_THAT(refused.err, Contains("there is no 'nowhere'"));
}

#else

TEST_CASE("kill: tests of the whole program", "[kill]") {
  print_skipped("this build has no failpoints; scripts/test.sh configures them");
}

#endif

}  // namespace dstrain::test
