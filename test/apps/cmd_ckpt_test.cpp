#include <unistd.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "apps/commands.h"
#include "core/base/error.h"
#include "test/core/checkpoint/checkpoint_fixture.h"

namespace dstrain {
namespace {

using Catch::Contains;
using checkpoint_test::read_bytes;
using checkpoint_test::save_tiny;
using checkpoint_test::ScratchFolder;
using checkpoint_test::TinyState;
using checkpoint_test::write_bytes;

struct Output {
  int code = 0;
  std::string text;  // standard output
};

Output run(int (*command)(const CkptOptions&), const CkptOptions& options) {
  const ScratchFolder folder;
  Output output;
  std::fflush(stdout);
  const int saved = ::dup(STDOUT_FILENO);
  REQUIRE(std::freopen((folder / "out").c_str(), "w", stdout) != nullptr);
  std::exception_ptr error;
  try {
    output.code = command(options);
  } catch (...) {
    error = std::current_exception();
  }
  std::fflush(stdout);
  ::dup2(saved, STDOUT_FILENO);
  ::close(saved);
  if (error) std::rethrow_exception(error);
  output.text = read_bytes(folder / "out");
  return output;
}

}  // namespace

TEST_CASE("ckpt ls: one line for each checkpoint", "[ckpt]") {
  const ScratchFolder run_folder;
  CheckpointStore store(run_folder / kCheckpointFolderName, 3);
  save_tiny(store, 10);
  const std::string newer = save_tiny(store, 20);
  std::filesystem::resize_file(newer + "/rank-00000.safetensors", 10);
  store.begin(30);
  const Output table = run(cmd_ckpt_ls, {run_folder.path(), false});
  CHECK(table.code == 0);
  CHECK(std::count(table.text.begin(), table.text.end(), '\n') == 4);
  CHECK_THAT(table.text, Contains("step") && Contains("complete") &&
                             Contains("damaged: rank-00000.safetensors: has 10 bytes") &&
                             Contains("unfinished saves: 1"));
  CHECK(table.text.find("        20") < table.text.find("        10"));

  const Output json = run(cmd_ckpt_ls, {run_folder.path(), true});
  const auto first = nlohmann::json::parse(json.text.substr(0, json.text.find('\n')));
  CHECK(first["step"] == 20);
  CHECK(first["ok"] == false);
  CHECK(first["problems"].size() == 1);
  CHECK_THROWS_AS(run(cmd_ckpt_ls, {run_folder / "absent", false}), NotFoundError);
  CHECK_THROWS_AS(run(cmd_ckpt_ls, {"/usr/include", false}), NotFoundError);
}

TEST_CASE("ckpt verify: 0 for whole checkpoints, 65 for damaged ones", "[ckpt]") {
  const ScratchFolder run_folder;
  CheckpointStore store(run_folder / kCheckpointFolderName, 3);
  const std::string older = save_tiny(store, 10), newer = save_tiny(store, 20);
  CHECK(run(cmd_ckpt_verify, {older, false}).code == 0);
  CHECK(run(cmd_ckpt_verify, {run_folder.path(), false}).code == 0);
  CHECK_THAT(run(cmd_ckpt_verify, {newer, false}).text,
             Contains("step-00000020: ok, ") && Contains(" in 1 file, read at "));

  const SafetensorsReader shard(newer + "/rank-00000.safetensors");
  std::string bytes = read_bytes(shard.path());
  bytes[static_cast<size_t>(shard.at("embed").offset)] ^= 1;
  write_bytes(shard.path(), bytes);
  const Output damaged = run(cmd_ckpt_verify, {newer + "/", false});
  CHECK(damaged.code == static_cast<int>(ExitCode::bad_data));
  CHECK_THAT(damaged.text, Contains("rank-00000.safetensors: xxh3 mismatch at tensor 'embed'"));
  CHECK(run(cmd_ckpt_verify, {run_folder.path(), false}).code ==
        static_cast<int>(ExitCode::bad_data));
  CHECK(run(cmd_ckpt_verify, {older, false}).code == 0);
  const auto json = nlohmann::json::parse(run(cmd_ckpt_verify, {newer, true}).text);
  CHECK(json["ok"] == false);
  CHECK(json["path"] == newer);

  std::filesystem::remove(newer + "/manifest.json");
  CHECK(run(cmd_ckpt_verify, {newer, false}).code == static_cast<int>(ExitCode::bad_data));
  for (const char* absent : {"absent", "step-00000099"})
    CHECK_THROWS_AS(run(cmd_ckpt_verify, {run_folder / absent, false}), NotFoundError);
}

}  // namespace dstrain
