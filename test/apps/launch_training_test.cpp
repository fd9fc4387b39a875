#include "apps/launch_training.h"

#include <chrono>
#include <cstring>
#include <optional>
#include <thread>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/checkpoint/run_lock.h"
#include "test/support/catch.h"
#include "test/support/run_program.h"

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
  std::optional<RunLock> other(folder / "job");
  std::thread leaving([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    other.reset();
  });
  const std::string text = launch(folder.path());
  leaving.join();
  CHECK_THAT(text, Contains("there is no program '/nothing/mpirun'"));
}

TEST_CASE("launch_training: makes no folder before the ranks do", "[launch]") {
  const TempFolder folder;
  CHECK_THAT(launch(folder.path()), Contains("there is no program '/nothing/mpirun'"));
  CHECK_FALSE(path_exists(folder / "job"));
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
