#include "apps/restart_policy.h"

#include <filesystem>

#include "test/support/catch.h"
#include "test/support/temp_folder.h"

namespace dstrain {
namespace {

using Catch::Contains;
using Marks = std::vector<CheckpointMark>;
using Words = std::vector<std::string>;

CheckpointMark mark(int64_t step, const std::string& id = "new") {
  return {step, "c/step-" + std::to_string(step), id};
}

}  // namespace

TEST_CASE("restart_policy: from the newest checkpoint that the job made", "[launch]") {
  RestartPolicy policy(10, {mark(50, "old"), mark(40, "old")});
  // Nothing saved yet: --resume PATH or --overwrite still mean what they did.
  const auto first = policy.after_failure({mark(50, "old"), mark(40, "old")});
  CHECK(first.restarts);
  CHECK_FALSE(first.resume);
  CHECK(first.sentence == "starting again from where it began (restart 1 of 10)");
  // An older attempt's step 50 is still there, and this job did not want it.
  const auto second = policy.after_failure({mark(50, "old"), mark(45), mark(40, "old")});
  CHECK(second.resume == "c/step-45");
  const auto third = policy.after_failure({mark(60), mark(50, "old")});
  CHECK(third.resume == "latest");
  CHECK(third.sentence == "starting again from step 60 (restart 3 of 10)");
  // Overwritten: the same name, another folder.
  CHECK(RestartPolicy(1, {mark(50, "old")}).after_failure({mark(50)}).resume == "latest");
}

TEST_CASE("restart_policy: three failures without a newer checkpoint end the job", "[launch]") {
  RestartPolicy policy(100, {});
  CHECK(policy.after_failure({}).restarts);
  CHECK(policy.after_failure({}).restarts);
  CHECK(policy.after_failure({mark(10)}).restarts);
  CHECK(policy.after_failure({mark(10)}).restarts);
  const auto end = policy.after_failure({mark(10)});
  CHECK_FALSE(end.restarts);
  CHECK_THAT(end.sentence, Contains("failed 3 times without a checkpoint newer than step 10"));
}

TEST_CASE("restart_policy: launch.max_restarts", "[launch]") {
  const auto never = RestartPolicy(0, {}).after_failure({});
  CHECK_FALSE(never.restarts);
  CHECK_THAT(never.sentence, Contains("launch.max_restarts is 0"));
  RestartPolicy once(1, {});
  CHECK(once.after_failure({mark(1)}).restarts);
  const auto end = once.after_failure({mark(2)});
  CHECK_FALSE(end.restarts);
  CHECK_THAT(end.sentence, Contains("started again 1 time (launch.max_restarts)"));
}

TEST_CASE("restart_policy: which exit codes may end better", "[launch]") {
  for (const int code : {0, 2, 65, 66, 75, 77, 78}) CHECK_FALSE(is_restartable(code));
  for (const int code : {1, 74, 110, 139, 137}) CHECK(is_restartable(code));
}

TEST_CASE("restart_policy: the words of a restart", "[launch]") {
  const Words words = {"--config", "a.yaml", "--overwrite", "--resume", "x", "--set", "a=b"};
  CHECK(rank_words(words, std::nullopt) == words);
  CHECK(rank_words(words, "latest") ==
        Words{"--config", "a.yaml", "--set", "a=b", "--resume", "latest"});
  CHECK(rank_words({"--resume"}, "latest") == Words{"--resume", "latest"});
}

TEST_CASE("restart_policy: a checkpoint that was made anew has another mark", "[launch]") {
  namespace fs = std::filesystem;
  const test::TempFolder folder;
  CHECK(mark_checkpoints(folder / "none").empty());
  const std::string path = folder / "step-00000010";
  fs::create_directory(path);
  fs::create_directory(folder / "step-00000020");
  fs::create_directory(folder / "other");
  const Marks before = mark_checkpoints(folder.path());
  REQUIRE(before.size() == 2);
  CHECK(before[0].step == 20);
  CHECK(before[1].path == path);
  CHECK(mark_checkpoints(folder.path()) == before);
  fs::remove(path);
  fs::create_directory(folder / "keeps-the-number");
  fs::create_directory(path);
  const Marks after = mark_checkpoints(folder.path());
  CHECK(after[0] == before[0]);
  CHECK_FALSE(after[1] == before[1]);
}

}  // namespace dstrain
