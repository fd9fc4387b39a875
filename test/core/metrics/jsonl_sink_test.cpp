#include "core/metrics/jsonl_sink.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/metrics/record_json.h"
#include "test/core/metrics/records.h"
#include "test/core/metrics/temp_folder.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

std::vector<std::string> events_of(const std::string& path) {
  std::vector<std::string> events;
  for (const std::string& line : split_lines(read_text(path))) {
    const auto object = nlohmann::json::parse(line);
    events.push_back(object["event"].get<std::string>() + " " + object["step"].dump());
  }
  return events;
}

using Events = std::vector<std::string>;

}  // namespace

TEST_CASE("json_line: one object a line, with ts, level, event and step first") {
  const std::string line = json_line(example_step(120), 1700000000.125);
  CHECK_THAT(
      line, Catch::StartsWith(R"({"ts":1700000000.125,"level":"info","event":"step","step":120,)"));
  CHECK(line.find('\n') == line.size() - 1);
  const auto object = nlohmann::json::parse(line);
  CHECK(object["steps"] == 600);
  CHECK(object["loss"] == 3.4123);
  CHECK(object["total_tokens"] == 491520);
  CHECK(object["load_max_over_mean"] == 1.324);
  CHECK(object["dead_experts"] == 0);
  CHECK(object["skipped"] == false);
  CHECK_FALSE(object.contains("mtp_loss"));
  CHECK_FALSE(object.contains("mfu"));
}

TEST_CASE("json_line: traffic by phase beside its baseline, where there is any") {
  StepRecord record = example_step(120);
  CHECK_FALSE(nlohmann::json::parse(json_line(record, 0)).contains("reduce_scatter_bytes"));
  record.traffic.emplace();
  record.traffic->reduce_scatter = {50, 1000, 20, 400, 1.5};
  const auto object = nlohmann::json::parse(json_line(record, 0));
  CHECK(object["reduce_scatter_bytes"] == 50);
  CHECK(object["reduce_scatter_fp32_bytes"] == 1000);
  CHECK(object["reduce_scatter_ms"] == 1.5);
  CHECK(object["reduce_scatter_between_nodes_bytes"] == 20);
  CHECK(object["reduce_scatter_between_nodes_fp32_bytes"] == 400);
  CHECK_FALSE(object.contains("all_gather_bytes"));
}

TEST_CASE("json_line: exposed communication and its parts, where ranks communicate") {
  StepRecord record = example_step(120);
  CHECK_FALSE(nlohmann::json::parse(json_line(record, 0)).contains("exposed_ms"));
  record.exposed.emplace();
  CHECK(nlohmann::json::parse(json_line(record, 0))["exposed_ms"] == 0.0);
  record.exposed->ms[static_cast<size_t>(CommKind::gradients)] = 2.5;
  record.exposed->ms[static_cast<size_t>(CommKind::results)] = 0.25;
  const auto object = nlohmann::json::parse(json_line(record, 0));
  CHECK(object["exposed_ms"] == 2.75);
  CHECK(object["exposed_gradients_ms"] == 2.5);
  CHECK(object["exposed_results_ms"] == 0.25);
  CHECK_FALSE(object.contains("exposed_experts_ms"));

  RunSummary summary = example_summary();
  CHECK_FALSE(nlohmann::json::parse(json_line(summary, 0)).contains("exposed_ms"));
  summary.step_ms = 50;
  summary.exposed = record.exposed;
  const auto end = nlohmann::json::parse(json_line(summary, 0));
  CHECK(end["step_ms"] == 50.0);
  CHECK(end["exposed_ms"] == 2.75);
}

TEST_CASE("ExposedRecord: sums and means keep what is absent apart from zero") {
  ExposedRecord sum, step;
  step.ms[1] = 2;
  sum += step;
  step.ms[1] = 4;
  step.ms[2] = 0;
  sum += step;
  const ExposedRecord mean = sum.mean_of(2);
  CHECK_FALSE(mean.ms[0]);
  CHECK(mean.ms[1] == 3.0);
  CHECK(mean.ms[2] == 0.0);
  CHECK(mean.total_ms() == 3);
}

TEST_CASE("json_line: doubles read back to the same bits") {
  StepRecord record = example_step(1);
  for (const double value : {0.1, 1.0 / 3, 3.0, 1e-310, 1.7976931348623157e308, -0.0, 5e-324}) {
    record.loss = value;
    const auto object = nlohmann::json::parse(json_line(record, 0));
    const double back = object["loss"].get<double>();
    CHECK(back == value);
    CHECK(std::signbit(back) == std::signbit(value));
  }
}

TEST_CASE("json_line: numbers that are not finite are null and a text") {
  StepRecord record = example_step(7);
  record.loss = std::numeric_limits<double>::quiet_NaN();
  record.grad_norm = std::numeric_limits<double>::infinity();
  record.mtp_loss = -std::numeric_limits<double>::infinity();
  record.skipped = true;
  record.skipped_total = 2;
  const auto object = nlohmann::json::parse(json_line(record, 0));
  CHECK(object["loss"].is_null());
  CHECK(object["loss_text"] == "nan");
  CHECK(object["grad_norm"].is_null());
  CHECK(object["grad_norm_text"] == "inf");
  CHECK(object["mtp_loss_text"] == "-inf");
  CHECK(object["level"] == "warning");
  CHECK(object["skipped_total"] == 2);
  CHECK_FALSE(object.contains("lr_text"));
}

TEST_CASE("json_line: evaluations, checkpoints, start and end") {
  const auto eval = nlohmann::json::parse(json_line(example_eval(100), 0));
  CHECK(eval["event"] == "eval");
  CHECK(eval["set"] == "valid");
  CHECK(eval["bits_per_byte"] == 1.8512);
  CheckpointRecord failed = example_checkpoint(100);
  failed.ok = false;
  failed.error = "cannot write '\xff': No space left on device";  // a path need not be UTF-8
  const auto checkpoint = nlohmann::json::parse(json_line(failed, 0));
  CHECK(checkpoint["level"] == "warning");
  CHECK_THAT(checkpoint["error"].get<std::string>(), Catch::Contains("No space left"));
  StartupInfo info = example_start();
  info.data[0].documents.reset();
  const auto start = nlohmann::json::parse(json_line(info, 0));
  CHECK(start["schema"] == 1);
  CHECK(start["memory_bytes"]["activations"] == 210000000);
  CHECK(start["data"][0]["tokens"] == 1012345);
  CHECK_FALSE(start["data"][0].contains("documents"));
  CHECK_FALSE(start.contains("communicator_bytes"));
  info.communicators = CommunicatorMemory{5, 1 << 30, true};
  const auto with_gpus = nlohmann::json::parse(json_line(info, 0));
  CHECK(with_gpus["communicators"] == 5);
  CHECK(with_gpus["communicator_bytes"] == 1 << 30);
  const auto end = nlohmann::json::parse(json_line(example_summary(), 0));
  CHECK(end["outcome"] == "finished");
  CHECK(end["evals"][0]["bits_per_byte"] == 1.8512);
  CHECK(end["next"].size() == 2);
}

TEST_CASE("JsonlSink: every record is in the file when the call returns") {
  const TempFolder folder;
  const std::string path = folder.file("metrics.jsonl");
  JsonlSink sink(path, std::nullopt);
  sink.on_start(example_start());
  sink.on_step(example_step(1));
  sink.on_eval(example_eval(1));
  sink.on_checkpoint(example_checkpoint(1));
  sink.on_end(example_summary());
  CHECK(events_of(path) == Events{"start 0", "step 1", "eval 1", "checkpoint 1", "end 600"});
}

TEST_CASE("JsonlSink: a resumed run holds each step once, wherever the kill fell") {
  const TempFolder folder;
  const std::string path = folder.file("metrics.jsonl");
  {
    JsonlSink sink(path, std::nullopt);
    sink.on_start(example_start());
    for (int64_t step = 1; step <= 6; ++step) {
      sink.on_step(example_step(step));
      if (step == 5) sink.on_checkpoint(example_checkpoint(4));  // a save in the background
    }
  }
  const std::string whole = read_text(path);
  const size_t last_line = whole.rfind('\n', whole.size() - 2) + 1;
  for (size_t cut = last_line; cut <= whole.size(); cut += 7) {
    write_text(path, whole.substr(0, cut));
    JsonlSink sink(path, 4);
    for (int64_t step = 5; step <= 6; ++step) sink.on_step(example_step(step));
    CHECK(events_of(path) == Events{"start 0", "step 1", "step 2", "step 3", "step 4",
                                    "checkpoint 4", "step 5", "step 6"});
  }
}

TEST_CASE("JsonlSink: a run from scratch starts the file") {
  const TempFolder folder;
  const std::string path = folder.file("metrics.jsonl");
  write_text(path, "{\"event\":\"step\",\"step\":1}\n");
  JsonlSink sink(path, std::nullopt);
  sink.on_step(example_step(1));
  CHECK(events_of(path) == Events{"step 1"});
}

TEST_CASE("rewind_jsonl: a torn last line goes, a whole one gets its newline") {
  const TempFolder folder;
  const std::string path = folder.file("metrics.jsonl");
  const std::string one = R"({"event":"step","step":1})", two = R"({"event":"step","step":2})";
  write_text(path, one + "\n" + two.substr(0, 20));
  rewind_jsonl(path, 2);
  CHECK(read_text(path) == one + "\n");
  write_text(path, one + "\n" + two);
  rewind_jsonl(path, 2);
  CHECK(read_text(path) == one + "\n" + two + "\n");
  CHECK_FALSE(std::filesystem::exists(path + ".tmp"));
}

TEST_CASE("rewind_jsonl: damage in the middle costs only the damaged lines and is counted") {
  const TempFolder folder;
  const std::string path = folder.file("metrics.jsonl");
  const std::string one = R"({"event":"step","step":1})", two = R"({"event":"step","step":2})";
  write_text(path, one + "\n" + std::string(64, '\0') + "\n[1]\n\n{\"step\":\"x\"}\n" + two + "\n");
  std::string log;
  set_log_writer([&](std::string_view line) { log.append(line); });
  rewind_jsonl(path, 2);
  set_log_writer({});
  CHECK(read_text(path) == one + "\n" + two + "\n");
  CHECK(log == "warning: '" + path + "': 4 damaged line(s) dropped");
}

TEST_CASE("rewind_jsonl: a file that needs no change is not touched") {
  const TempFolder folder;
  const std::string path = folder.file("metrics.jsonl");
  write_text(path, "{\"event\":\"step\",\"step\":1}\n");
  struct stat before, after;
  REQUIRE(::stat(path.c_str(), &before) == 0);
  rewind_jsonl(path, 1);
  REQUIRE(::stat(path.c_str(), &after) == 0);
  CHECK(before.st_ino == after.st_ino);
  rewind_jsonl(folder.file("missing"), 1);
  CHECK_FALSE(std::filesystem::exists(folder.file("missing")));
  rewind_jsonl("/dev/full", 1);  // reading it would never end
}

TEST_CASE("JsonlSink: a folder that is not there is an error before training, with the path") {
  const TempFolder folder;
  CHECK_THROWS_AS(JsonlSink(folder.file("missing/metrics.jsonl"), std::nullopt), NotFoundError);
  CHECK_THROWS_AS(JsonlSink(folder.path(), 3), StorageError);
}

TEST_CASE("JsonlSink: a full disk does not stop the steps") {
  JsonlSink sink("/dev/full", std::nullopt);
  set_log_writer([](std::string_view) {});
  for (int64_t step = 1; step <= 3; ++step) CHECK_NOTHROW(sink.on_step(example_step(step)));
  set_log_writer({});
}

}  // namespace dstrain
