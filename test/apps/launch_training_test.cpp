#include "apps/launch_training.h"

#include <sys/file.h>
#include <sys/stat.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <optional>
#include <thread>

#include "apps/launch_machine.h"
#include "apps/run_folder.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/checkpoint/run_lock.h"
#include "test/support/catch.h"
#include "test/support/tiny_job.h"

namespace dstrain {
namespace {

using Catch::Contains;
using test::TempFolder;

// Comes as far as looking for an mpirun, which is not there. The error's text.
std::string launch(const std::string& folder) {
  Config config;
  config.run.dir = folder;
  config.run.name = "job";
  const Variables variables = [](const char* name) {
    return std::strcmp(name, "DSTRAIN_MPIRUN") == 0 ? "/nothing/mpirun" : nullptr;
  };
  try {
    launch_training(config, {{"", 2}}, {"--overwrite"}, {}, variables);
  } catch (const RuntimeFailure& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("launch_training: no rank starts in a run folder that is in use", "[launch]") {
  const TempFolder folder;
  create_folders(folder / "job");
  const RunLock other(folder / "job");
  CHECK_THAT(launch(folder.path()), Contains("job' is in use by process "));
}

TEST_CASE("launch_training: waits for the ranks of a launcher that was killed", "[launch]") {
  const TempFolder folder;
  create_folders(folder / "job");
  std::optional<RunLock> other(std::in_place, folder / "job", RunLock::Part::ranks);
  std::thread leaving([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    other.reset();
  });
  const std::string text = launch(folder.path());
  leaving.join();
  CHECK_THAT(text, Contains("there is no program '/nothing/mpirun'"));
}

TEST_CASE("run_folder: a run without a launcher waits for a killed one's ranks, too", "[lock]") {
  const RunRole role = GENERATE(RunRole::alone, RunRole::ranks);
  const TempFolder folder;
  std::optional<RunLock> other(std::in_place, folder.path(), RunLock::Part::ranks);
  std::thread leaving([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    other.reset();
  });
  CHECK_NOTHROW(RunFolder(folder.path(), role));
  leaving.join();
  // It holds what it waited for.
  const RunFolder run(folder.path(), role);
  CHECK_THROWS_WITH(RunLock(folder.path(), RunLock::Part::ranks), Contains("is in use by process"));
}

TEST_CASE("run_folder: ranks that do not leave are waited for some seconds", "[lock]") {
  const TempFolder folder;
  // Of a holder that has not said who it is each look takes a second.
  const File held = File::open_or_create(folder / "ranks.lock");
  REQUIRE(::flock(held.fd(), LOCK_EX) == 0);
  const double started = test::monotonic_seconds();
  CHECK_THROWS_WITH(RunFolder(folder.path(), RunRole::alone),
                    Contains("in use by another process"));
  CHECK(test::monotonic_seconds() - started < 12);
}

TEST_CASE("launch_training: where no rank has written anything, no folder stays", "[launch]") {
  const TempFolder folder;
  CHECK_THAT(launch(folder / "new"), Contains("there is no program '/nothing/mpirun'"));
  CHECK_FALSE(path_exists(folder / "new"));
  create_folders(folder / "old/job");
  CHECK_THAT(launch(folder / "old"), Contains("there is no program '/nothing/mpirun'"));
  CHECK(path_exists(folder / "old/job"));
}

TEST_CASE("find_mpirun: one that does not answer is not waited for", "[launch]") {
  const TempFolder folder;
  const std::string silent = folder / "mpirun";
  // The child of the first keeps its pipe open; the second closes it and stays.
  const std::string hangs = GENERATE("sleep 20 & exit", "exec >&-; sleep 20");
  test::write_file(silent, "#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n" + hangs + "\n");
  REQUIRE(::chmod(silent.c_str(), 0755) == 0);
  const Variables variables = [&](const char* name) {
    return std::strcmp(name, "DSTRAIN_MPIRUN") == 0 ? silent.c_str() : nullptr;
  };
  const double started = test::monotonic_seconds();
  CHECK_THROWS_WITH(find_mpirun(variables, "launch.ranks: 2", /*answer_s=*/0.3),
                    Contains("mpirun --version' has not answered within 0.3 s"));
  CHECK(test::monotonic_seconds() - started < 10);
}

// Both would find the folder free as long as no rank has come to lock it.
TEST_CASE("launch: while a launcher lives no other run gets its folder", "[launch][lock]") {
  const test::TinyJob job({"train.steps=4"});
  const std::string mpirun = job.folder() + "/mpirun";
  test::write_file(mpirun,
                   "#!/bin/sh\n[ $1 = --version ] && { echo 'mpirun (Open MPI) 4.1.4'; exit; }\n"
                   "touch \"$0\".started\nexec sleep 60\n");
  REQUIRE(::chmod(mpirun.c_str(), 0755) == 0);
  const auto launch_with_fake = [&](const std::vector<std::string>& more) {
    test::Launch launch = job.launch(more);
    launch.args.insert(launch.args.begin(), {"DSTRAIN_MPIRUN=" + mpirun, launch.program});
    launch.program = "/usr/bin/env";
    return launch;
  };
  const std::vector<std::string> two = {"--set", "launch.ranks=2"};
  test::RunningProgram first(launch_with_fake(two));
  REQUIRE(first.wait_until([&] { return path_exists(mpirun + ".started"); }));
  const std::string holder = "is in use by process " + std::to_string(first.pid()) + " on host ";
  for (const std::vector<std::string>& args :
       {two, test::joined(two, {"--resume", "latest"}), test::joined(two, {"--overwrite"}),
        std::vector<std::string>(), std::vector<std::string>{"--resume", "latest"}}) {
    const test::Finished second = run_program(launch_with_fake(args));
    INFO(second.err);
    CHECK(second.code == static_cast<int>(ExitCode::failure));
    CHECK(second.seconds < 4);
    CHECK_THAT(second.err, Contains(holder) && !Contains("restart"));
  }

  // What SIGKILL leaves behind is in nobody's way.
  first.send(SIGKILL);
  CHECK(first.wait().signal == SIGKILL);
  CHECK_THAT(job.must_train(two).err, Contains("which ended without releasing it"));
  CHECK(job.saved_steps() == std::vector<int64_t>{4});
}

TEST_CASE("launch: of two that start at the same time one trains", "[launch][lock]") {
  const test::TinyJob job({"launch.ranks=2", "train.steps=40"});
  test::RunningProgram a(job.launch()), b(job.launch());
  test::Finished trained = a.wait(), refused = b.wait();
  if (trained.code != 0) std::swap(trained, refused);
  INFO(trained.err << refused.err);
  CHECK(trained.code == 0);
  CHECK(refused.code == static_cast<int>(ExitCode::failure));
  CHECK_THAT(refused.err, Contains("is in use by process ") && !Contains("restart"));
  CHECK(job.saved_steps().back() == 40);
}

TEST_CASE("launch_training: a job file that can be read once is refused for several ranks",
          "[launch]") {
  test::Launch launch;
  launch.args = {"--config", "/dev/stdin", "--set", "launch.ranks=2"};
  launch.input = "run: {name: x}\nmodel: {vocab_size: 16}\ndata: {train: [{path: none}]}\n";
  launch.program = "/bin/sh";
  std::vector<std::string> words = {"-c", "cat | \"$@\"", "sh", DSTRAIN_BINARY};
  words.insert(words.end(), launch.args.begin(), launch.args.end());
  launch.args = words;
  const test::Finished refused = test::run_program(launch);
  CHECK(refused.code == static_cast<int>(ExitCode::usage));
  CHECK_THAT(refused.err, Contains("'/dev/stdin' is no regular file"));
}

}  // namespace dstrain
