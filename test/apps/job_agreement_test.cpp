// Ranks that were given different jobs: refused by all of them, with what differs.
#include "apps/job_agreement.h"

#include <fmt/format.h>

#include "core/base/error.h"
#include "test/support/rank_threads.h"
#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;

// What each of three ranks is told, by rank; "" where it may go on.
std::vector<std::string> told(const std::function<void(Communicator&)>& agree) {
  std::vector<std::string> texts(3);
  run_ranks(3, [&](RankContext& rank) {
    try {
      agree(rank.world);
    } catch (const Error& e) {
      texts[static_cast<size_t>(rank.world.rank())] = e.what();
    }
  });
  return texts;
}

std::string machine_of(const Communicator& world) {
  return fmt::format("node{}", world.rank());
}

}  // namespace

TEST_CASE("job agreement: a rank with another job is refused by all ranks", "[agreement]") {
  const std::vector<std::string> texts = told([](Communicator& world) {
    Config config;
    if (world.rank() == 2) {
      config.train.steps = 7;
      config.optimizer.lr = 0.25;
    }
    require_same_job(world, machine_of(world), config);
  });
  CHECK_THAT(texts[0], Contains("rank 2 on node2 was started with another job than rank 0: ") &&
                           Contains("train.steps: 1000 -> 7") && Contains(" -> 0.25") &&
                           Contains("every host needs the same job file"));
  CHECK(texts[1] == texts[0]);
  CHECK(texts[2] == texts[0]);
}

TEST_CASE("job agreement: of jobs that differ in much, a few keys are named", "[agreement]") {
  const std::vector<std::string> texts = told([](Communicator& world) {
    Config config;
    if (world.rank() > 0)
      config.train = {.steps = 3,
                      .global_batch = 4,
                      .micro_batch = 2,
                      .eval_every = 5,
                      .eval_batches = 6,
                      .log_every = 7,
                      .max_skipped_steps = 8};
    require_same_job(world, machine_of(world), config);
  });
  CHECK_THAT(texts[0], Contains("rank 1 on node1 ") && Contains(" and 2 more; "));
}

TEST_CASE("job agreement: threads and the launcher's settings are each host's own", "[agreement]") {
  const std::vector<std::string> texts = told([](Communicator& world) {
    Config config;
    config.run.threads = 1 + world.rank();
    config.launch.hang_timeout = 60 + world.rank();
    require_same_job(world, machine_of(world), config);
    require_same_data(world, machine_of(world), {{"tokenizer", "a0"}});
  });
  CHECK(texts == std::vector<std::string>(3));
}

TEST_CASE("job agreement: a rank with other data is refused by all ranks", "[agreement]") {
  const std::vector<std::string> texts = told([](Communicator& world) {
    const std::string print = world.rank() == 1 ? "b1" : "a0";
    require_same_data(world, machine_of(world), {{"data.train[0]", print}, {"tokenizer", "c2"}});
  });
  CHECK(texts[0] ==
        "rank 1 on node1 finds other contents than rank 0 in data.train[0]; copy the "
        "same files to every host");
  CHECK(texts[1] == texts[0]);
  CHECK(texts[2] == texts[0]);
}

// Without a check the first rank ends after two steps and the other waits for its third.
TEST_CASE("job agreement: mpirun with other options for one rank trains nothing",
          "[agreement][job]") {
  const TinyJob job;
  Launch launch = job.launch({"--set", "train.steps=2"});
  std::string words;
  for (const std::string& word : launch.args) words += fmt::format(" '{}'", word);
  const std::string script = fmt::format(
      "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1\n"
      "exec mpirun --oversubscribe --bind-to none -np 1 {0}{1} : -np 1 {0}{1} --set train.steps=3",
      DSTRAIN_BINARY, words);
  launch.program = "/bin/bash";
  launch.args = {"-c", script};
  const Finished done = run_program(launch);
  CHECK(done.code == 78);
  CHECK_THAT(done.err, Contains("was started with another job than rank 0: train.steps: 2 -> 3; "));
  CHECK(job.saved_steps().empty());
}

}  // namespace dstrain::test
