// The folder of a run and the disk under it: full, read-only, in use by another run, or removed
// while the run goes on. A save that fails costs that save; a run that cannot save says why.
#include <sys/resource.h>

#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;
namespace fs = std::filesystem;

constexpr int kStorage = static_cast<int>(ExitCode::storage);
constexpr int kNoPermission = static_cast<int>(ExitCode::no_permission);
constexpr int kBadConfig = static_cast<int>(ExitCode::bad_config);
// A checkpoint of the tiny job takes about 560 KiB, its metrics a few.
constexpr int64_t kTooSmallForASave = 300 << 10;

int64_t count(const std::string& text, const std::string& part) {
  int64_t found = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++found;
  return found;
}

// A tmpfs, or nothing with the line that counts as skipped.
std::unique_ptr<SmallDisk> make_disk(const std::string& options) {
  auto disk = std::make_unique<SmallDisk>(options);
  if (disk->mounted()) return disk;
  print_skipped(disk->error());
  return nullptr;
}

std::map<std::string, std::string> finished_state(const std::vector<std::string>& settings) {
  const TinyJob job(settings);
  job.must_train();
  return trace_of(job).state;
}

void lift_file_size_limit(pid_t pid) {
  const rlimit none{RLIM_INFINITY, RLIM_INFINITY};
  REQUIRE(::prlimit(pid, RLIMIT_FSIZE, &none, nullptr) == 0);
}

}  // namespace

TEST_CASE("storage: saves that keep failing end the run with 74 and harm no earlier one",
          "[storage]") {
  const std::string async = GENERATE("true", "false");
  const TinyJob job({"train.steps=60", "checkpoint.every=4", "checkpoint.async=" + async});
  job.must_train({"--set", "train.steps=8"});
  Launch launch = job.launch({"--resume", "latest"});
  launch.file_size_limit = kTooSmallForASave;
  const Finished failed = run_program(launch);
  INFO(failed.err);
  CHECK(failed.code == kStorage);
  CHECK_THAT(failed.err, Contains("3 saves in a row failed") && Contains("step-000000") &&
                             Contains(std::strerror(EFBIG)));
  CHECK(last_step(job) >= 20);  // training went on after the first two
  CHECK(last_step(job) < 60);
  CHECK(events(job, "checkpoint").size() >= 4);
  CHECK(job.saved_steps() == std::vector<int64_t>{4, 8});
  CHECK(job.damage() == "");
  CHECK(job.num_leftovers() == 0);

  job.must_train({"--resume", "latest"});
  CHECK(trace_of(job).state == finished_state({"train.steps=60"}));
}

TEST_CASE("storage: the last save is tried again, then the exit code is 74", "[storage]") {
  const TinyJob job({"train.steps=3", "checkpoint.every=0", "checkpoint.max_failed_saves=2"});
  Launch launch = job.launch();
  launch.file_size_limit = kTooSmallForASave;
  const Finished failed = run_program(launch);
  INFO(failed.err);
  CHECK(failed.code == kStorage);
  CHECK_THAT(failed.err, Contains("2 saves in a row failed"));
  CHECK(job.saved_steps().empty());
}

#ifdef DSTRAIN_FAILPOINTS

TEST_CASE("storage: a limit that is lifted costs the saves until then", "[storage]") {
  const std::vector<std::string> settings = {"train.steps=40", "checkpoint.every=1"};
  const TinyJob job(settings);
  Launch launch = job.launch();
  launch.file_size_limit = kTooSmallForASave;
  launch.failpoint = "snapshot.before_write@3=sleep:400";
  RunningProgram program(launch);
  REQUIRE(program.wait_until([&] { return events(job, "checkpoint").size() == 2; }));
  lift_file_size_limit(program.pid());
  const Finished end = program.wait();
  INFO(end.err);
  CHECK(end.code == 0);
  CHECK(count(end.err, std::strerror(EFBIG)) == 2);
  CHECK(job.damage() == "");
  CHECK(trace_of(job).state == finished_state(settings));
}

TEST_CASE("storage: a full disk on which space is made", "[storage]") {
  const auto disk = make_disk("size=2m");
  if (!disk) return;
  const std::vector<std::string> settings = {"train.steps=40", "checkpoint.every=1",
                                             "checkpoint.keep=1"};
  TinyJob job(settings);
  fs::create_directory_symlink(disk->path(), job.folder() + "/runs");
  write_file(disk->path() + "/filler", std::string(1700 << 10, 'x'));
  Launch launch = job.launch();
  launch.failpoint = "snapshot.before_write@3=sleep:400";
  RunningProgram program(launch);
  REQUIRE(program.wait_until([&] { return count(program.err(), std::strerror(ENOSPC)) >= 2; }));
  fs::remove(disk->path() + "/filler");
  const Finished end = program.wait();
  INFO(end.err);
  CHECK(end.code == 0);
  CHECK(job.damage() == "");
  CHECK(job.num_leftovers() == 0);
  CHECK(trace_of(job).state == finished_state(settings));
}

TEST_CASE("storage: a checkpoint folder that somebody removes is made again", "[storage]") {
  const bool whole_run = GENERATE(false, true);
  const std::vector<std::string> settings = {"train.steps=40", "checkpoint.every=1",
                                             "checkpoint.keep=9"};
  const TinyJob job(settings);
  Launch launch = job.launch();
  launch.failpoint = "snapshot.before_write@5=sleep:400";
  RunningProgram program(launch);
  REQUIRE(program.wait_until([&] { return job.saved_steps().size() == 4; }));
  program.send(SIGSTOP);
  fs::remove_all(whole_run ? job.run_folder() : job.checkpoints());
  program.send(SIGCONT);
  const Finished end = program.wait();
  CAPTURE(whole_run, end.err);
  CHECK((end.code == 0 || end.code == kStorage));
  CHECK(job.damage() == "");
  if (end.code == 0) CHECK(trace_of(job).state == finished_state(settings));
}

TEST_CASE("run folder: a second run is refused and the first goes on", "[storage][lock]") {
  const std::vector<std::string> settings = {"train.steps=40", "checkpoint.every=1"};
  const TinyJob job(settings);
  Launch launch = job.launch();
  launch.failpoint = "snapshot.before_write@3=sleep:400";
  RunningProgram first(launch);
  REQUIRE(first.wait_until([&] { return job.saved_steps().size() == 2; }));
  first.send(SIGSTOP);
  char host[256] = {};
  REQUIRE(::gethostname(host, sizeof host - 1) == 0);
  for (const std::vector<std::string>& args :
       {std::vector<std::string>{"--resume", "latest"}, {"--overwrite"}, {}}) {
    const Finished second = job.train(args);
    INFO(second.err);
    CHECK(second.code == static_cast<int>(ExitCode::failure));
    CHECK_THAT(second.err,
               Contains("is in use by process " + std::to_string(first.pid())) && Contains(host));
  }
  first.send(SIGCONT);
  const Finished end = first.wait();
  INFO(end.err);
  CHECK(end.code == 0);
  CHECK(trace_of(job).state == finished_state(settings));
}

#endif

TEST_CASE("storage: disks of every size, from none to one checkpoint and a fifth", "[storage]") {
  if (!make_disk("size=4k")) return;
  int complete = 0;
  for (const int kilobytes : {4, 16, 64, 160, 280, 400, 520, 548, 560, 600, 680}) {
    CAPTURE(kilobytes);
    const auto disk = make_disk("size=" + std::to_string(kilobytes) + "k");
    REQUIRE(disk != nullptr);
    const TinyJob job({"train.steps=4", "checkpoint.every=0"});
    fs::create_directory_symlink(disk->path(), job.folder() + "/runs");
    const Finished finished = job.train();
    INFO(finished.err);
    CHECK((finished.code == 0 || finished.code == kStorage));
    if (finished.code != 0) CHECK_THAT(finished.err, Contains(std::strerror(ENOSPC)));
    CHECK(job.damage() == "");
    CHECK(job.num_leftovers() == 0);
    CHECK(job.saved_steps().size() == (finished.code == 0 ? 1u : 0u));
    complete += finished.code == 0;
  }
  CHECK(complete >= 1);
  CHECK(complete <= 4);
}

TEST_CASE("run folder: a read-only file system is refused before the first step", "[storage]") {
  const auto disk = make_disk("size=4m");
  if (!disk) return;
  const TinyJob job({"train.steps=4"});
  fs::create_directory_symlink(disk->path(), job.folder() + "/runs");
  SECTION("new run") {}
  SECTION("run with checkpoints") {
    job.must_train({"--set", "train.steps=2"});
  }
  disk->remount_read_only();
  const Finished refused = job.train({"--resume", "latest"});
  INFO(refused.err);
  CHECK(refused.code == kNoPermission);
  CHECK_THAT(refused.err, Contains("runs/tiny") && Contains("not writable for user") &&
                              Contains(std::strerror(EROFS)));
  CHECK_THAT(refused.err, !Contains("step  1"));
  // Looking at it needs no permission.
  if (!job.saved_steps().empty()) {
    CHECK(run_program({"ckpt", "verify", job.run_folder()}).code == 0);
    CHECK(run_program({"eval", "--run", job.run_folder()}).code == 0);
  }
}

TEST_CASE("run folder: paths that cannot be one are refused with their name", "[storage]") {
  const TinyJob job({"train.steps=2"});
  write_file(job.folder() + "/file", "x");
  fs::create_symlink("nowhere", job.folder() + "/dangling");
  fs::create_symlink("round", job.folder() + "/round");
  const std::string long_name(256, 'a');
  struct Case {
    std::string dir, part;
  };
  for (const auto& [dir, part] : {Case{"file", "'file' is a file"},
                                  {"file/below", "'file' is a file"},
                                  {"dangling", "symbolic link to nothing"},
                                  {long_name, "more than 255 bytes"}}) {
    const Finished refused = job.train({"--set", "run.dir=" + dir});
    INFO(refused.err);
    CHECK(refused.code == kBadConfig);
    CHECK_THAT(refused.err, Contains(part));
  }
  const Finished looped = job.train({"--set", "run.dir=round"});
  CHECK(looped.code != 0);
  CHECK_THAT(looped.err, Contains("round"));
  CHECK_FALSE(fs::exists(job.folder() + "/runs"));
}

TEST_CASE("run folder: a run that is refused before its first step leaves none", "[storage]") {
  const TinyJob job, other({"train.steps=2"});
  other.must_train();
  const std::string of_another_model = other.checkpoint(2);
  struct Refused {
    std::vector<std::string> args;
    ExitCode code;
  };
  const Refused cases[] = {
      {{"--set", "train.global_batch=3"}, ExitCode::bad_config},
      {{"--set", "parallel.data=3"}, ExitCode::bad_config},
      {{"--set", "data.tokenizer=absent"}, ExitCode::no_input},
      {{"--set", "data.train=[{path: absent}]"}, ExitCode::no_input},
      {{"--set", "model.vocab_size=16000000", "--set", "model.hidden_size=1000000"},
       ExitCode::bad_config},  // memory
      {{"--resume", "absent"}, ExitCode::no_input},
      {{"--resume", of_another_model, "--set", "model.hidden_size=48"}, ExitCode::bad_data},
      {{"--set", "data.seq_len=12000", "--set", "model.max_position_embeddings=12000", "--set",
        "train.micro_batch=1"},
       ExitCode::bad_data},
  };
  for (const Refused& refused : cases) {
    CAPTURE(refused.args);
    const Finished finished = job.train(refused.args);
    INFO(finished.err);
    CHECK(finished.code == static_cast<int>(refused.code));
    CHECK_FALSE(fs::exists(job.folder() + "/runs"));
  }
  // A folder that was there stays, with what it holds.
  fs::create_directories(job.run_folder());
  write_file(job.run_folder() + "/notes.txt", "mine");
  CHECK(job.train(cases[5].args).code == static_cast<int>(ExitCode::no_input));
  CHECK(read_file(job.run_folder() + "/notes.txt") == "mine");
  job.must_train({"--set", "train.steps=1"});
}

TEST_CASE("run folder: unusual names work", "[storage]") {
  for (const std::string& dir :
       {std::string("with space/and 'quote'"), std::string("\xc3\xbc\xe2\x82\xac"),
        std::string(250, 'n'), std::string("latin1 \xe4\xf6")}) {
    const TinyJob job({"train.steps=2"});
    const Finished finished = job.train({"--set", "run.dir=" + dir});
    INFO(finished.err);
    if (dir.starts_with("latin1")) {
      CHECK(finished.code == kBadConfig);  // a job file is UTF-8, and so is what overrides it
      continue;
    }
    CHECK(finished.code == 0);
    const std::string run = job.folder() + "/" + dir + "/tiny";
    CHECK(fs::exists(run + "/checkpoints/step-00000002/manifest.json"));
    // The command that the run proposes at its end, as a shell reads it.
    const auto end = nlohmann::json::parse(lines_of(read_file(run + "/metrics.jsonl")).back());
    std::string command = end["next"][0].get<std::string>();
    CHECK_THAT(command, Catch::StartsWith("deepseek-train generate --run "));
    command.replace(0, std::string("deepseek-train").size(), DSTRAIN_BINARY);
    Launch shell;
    shell.program = "/bin/sh";
    shell.args = {"-c", command};
    shell.folder = job.folder();
    const Finished generated = run_program(shell);
    INFO(command << "\n" << generated.err);
    CHECK(generated.code == 0);
  }
}

TEST_CASE("run folder: checkpoints there need --resume or --overwrite", "[storage]") {
  const TinyJob job({"train.steps=4", "checkpoint.every=1", "checkpoint.keep=4"});
  job.must_train();
  write_file(job.checkpoints() + "/notes.txt", "mine");
  const std::string metrics = read_file(job.metrics());
  for (const std::vector<std::string>& args : {std::vector<std::string>{}, {"--resume", "none"}}) {
    const Finished refused = job.train(args);
    INFO(refused.err);
    CHECK(refused.code == kBadConfig);
    CHECK_THAT(refused.err, Contains("already holds checkpoints") && Contains("--overwrite"));
    if (args.empty()) CHECK_THAT(refused.err, Contains("--resume latest"));
  }
  CHECK(read_file(job.metrics()) == metrics);
  CHECK(job.saved_steps().size() == 4);

  // A new start that fails costs nothing of the old run.
  CHECK(job.train({"--overwrite", "--set", "data.train=[{path: nowhere}]"}).code == 66);
  CHECK(job.train({"--overwrite", "--set", "data.seq_len=8000", "--set",
                   "model.max_position_embeddings=8000"})
            .code == 65);
  CHECK(job.saved_steps().size() == 4);
  CHECK(read_file(job.metrics()) == metrics);

  const Finished again = job.train({"--overwrite", "--set", "train.steps=2"});
  INFO(again.err);
  CHECK(again.code == 0);
  CHECK(job.saved_steps() == std::vector<int64_t>{1, 2});
  CHECK(last_step(job) == 2);
  CHECK(read_file(job.checkpoints() + "/notes.txt") ==
        "mine");  // not ours: reported, never removed
  CHECK_THAT(again.err, Contains("notes.txt"));
}

TEST_CASE("run folder: checkpoints that cannot be written are found before the first step",
          "[storage]") {
  const TinyJob job({"train.steps=4", "checkpoint.every=2"});
  job.must_train();
  const std::vector<std::string> go_on = {"--resume", "latest", "--set", "train.steps=8"};
  if (::geteuid() != 0) {  // who may write everywhere
    fs::permissions(job.checkpoints(), fs::perms::owner_read | fs::perms::owner_exec);
    const Finished refused = job.train(go_on);
    CHECK(refused.code == kNoPermission);
    CHECK_THAT(refused.err, Contains("'runs/tiny/checkpoints' is not writable for user "));
    fs::permissions(job.checkpoints(), fs::perms::owner_all);
  }
  fs::remove_all(job.checkpoints());
  write_file(job.checkpoints(), "no folder");
  for (const char* word : {"--overwrite", "--dry-run"}) {
    CAPTURE(word);
    CHECK_THAT(job.train({word}).err, Contains("runs/tiny/checkpoints' is a file, not a folder"));
  }
  CHECK(last_step(job) == 4);
}

}  // namespace dstrain::test
