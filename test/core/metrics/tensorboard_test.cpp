#include <fmt/format.h>

#include <cstring>
#include <filesystem>
#include <limits>
#include <string>

#include "core/base/error.h"
#include "core/metrics/crc32c.h"
#include "core/metrics/tensorboard_events.h"
#include "core/metrics/tensorboard_sink.h"
#include "test/core/metrics/records.h"
#include "test/core/metrics/temp_folder.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

std::string hex(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) out += fmt::format("{:02x}", static_cast<unsigned char>(c));
  return out;
}

// The data of each record, both checksums verified.
std::vector<std::string> records_of(std::string_view file) {
  const auto read_u32 = [&](size_t at) {
    uint32_t value;
    std::memcpy(&value, file.data() + at, sizeof value);
    return value;
  };
  const auto masked = [](std::string_view data) {
    const uint32_t crc = crc32c(data);
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
  };
  std::vector<std::string> records;
  while (!file.empty()) {
    REQUIRE(file.size() >= 16);
    uint64_t length;
    std::memcpy(&length, file.data(), sizeof length);
    REQUIRE(file.size() >= length + 16);
    REQUIRE(read_u32(8) == masked(file.substr(0, 8)));
    const std::string_view data = file.substr(12, length);
    REQUIRE(read_u32(12 + length) == masked(data));
    records.emplace_back(data);
    file.remove_prefix(length + 16);
  }
  return records;
}

}  // namespace

// The expected bytes were written by TensorBoard 2's own RecordWriter and protocol buffers.
TEST_CASE("tensorboard: golden bytes") {
  CHECK(hex(tensorboard_version_record(1700000000.25)) ==
        "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe9");
  CHECK(hex(tensorboard_restart_record(1700000001.5, 301)) ==
        "100000000000000095fbfe180900006040fc54d94110ad023a020801118727df");
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(hex(tensorboard_scalars_record(
            1700000002.75, 300,
            {{"train/loss", 3.25}, {"moe/dead_experts", 0.0}, {"train/grad_norm", nan}})) ==
        "520000000000000025eb07b7090000b040fc54d94110ac022a440a110a0a747261696e2f6c6f73731500005040"
        "0a170a106d6f652f646561645f6578706572747315000000000a160a0f747261696e2f677261645f6e6f726d15"
        "0000c07f8bf3aaa5");
}

TEST_CASE("tensorboard: tags that are not UTF-8 are mended") {
  const auto tag_of = [](std::string_view tag) {
    const std::string data = records_of(tensorboard_scalars_record(0, 1, {{tag, 1.0}})).at(0);
    // wall_time 9 bytes, step 2, summary header 2, value header 2, tag header 2, then the tag
    return data.substr(17, data.size() - 17 - 5);
  };
  CHECK(tag_of("eval/größe/€/😀/loss") == "eval/größe/€/😀/loss");
  CHECK(tag_of("a\xff"
               "b") == "a?b");
  CHECK(tag_of("a\xc3") == "a?");
  CHECK(tag_of("\xc0\xaf") == "??");            // overlong
  CHECK(tag_of("\xed\xa0\x80") == "???");       // surrogate
  CHECK(tag_of("\xf4\x90\x80\x80") == "????");  // past U+10FFFF
}

TEST_CASE("TensorBoardSink: one file per process, named so that readers find it") {
  const TempFolder folder;
  const std::string logs = folder.file("run/tensorboard");
  TensorBoardSink first(logs, std::nullopt), second(logs, 300);
  CHECK(first.path() != second.path());
  CHECK_THAT(first.path(),
             Catch::Matches(logs + "/events\\.out\\.tfevents\\.[0-9]{10}\\..+\\.[0-9]+\\.[0-9]+"));
  first.on_step(example_step(1));
  first.on_eval(example_eval(1));
  first.on_checkpoint(example_checkpoint(1));
  const std::vector<std::string> records = records_of(read_text(first.path()));
  REQUIRE(records.size() == 4);
  CHECK_THAT(records[0], Catch::Contains("brain.Event:2"));
  for (const char* tag : {"train/loss", "train/grad_norm", "train/lr", "train/tokens_per_s",
                          "moe/load_max_over_mean", "moe/dead_experts"})
    CHECK_THAT(records[1], Catch::Contains(tag));
  CHECK_THAT(records[1], !Catch::Contains("train/mtp_loss"));
  CHECK_THAT(records[2],
             Catch::Contains("eval/valid/loss") && Catch::Contains("eval/valid/bits_per_byte"));
  CHECK_THAT(records[3], Catch::Contains("checkpoint/bytes"));

  StepRecord sent = example_step(301);
  sent.traffic.emplace();
  sent.traffic->reduce_scatter = {50, 1000, 0, 0, 1.5};
  sent.exposed.emplace();
  sent.exposed->ms[static_cast<size_t>(CommKind::gradients)] = 2.5;
  sent.exposed->ms[static_cast<size_t>(CommKind::pipeline)] = 0.5;
  second.on_step(sent);
  const std::vector<std::string> resumed = records_of(read_text(second.path()));
  REQUIRE(resumed.size() == 3);                           // version, restart, step
  CHECK(hex(resumed[1]).substr(18) == "10ad023a020801");  // points from step 301 on are void
  CHECK_THAT(resumed[2], Catch::Contains("traffic/reduce_scatter_bytes") &&
                             Catch::Contains("traffic/reduce_scatter_fp32_bytes") &&
                             Catch::Contains("time/reduce_scatter_ms") &&
                             !Catch::Contains("between_nodes") && !Catch::Contains("all_gather"));
  CHECK_THAT(resumed[2], Catch::Contains("time/exposed_ms") &&
                             Catch::Contains("time/exposed_gradients_ms") &&
                             Catch::Contains("time/exposed_pipeline_ms") &&
                             !Catch::Contains("time/exposed_experts_ms"));
  CHECK_THAT(records[1], !Catch::Contains("traffic") && !Catch::Contains("exposed"));
}

TEST_CASE("TensorBoardSink: a folder that cannot be made is an error with the path") {
  const TempFolder folder;
  write_text(folder.file("file"), "x");
  CHECK_THROWS_WITH(TensorBoardSink(folder.file("file/tensorboard"), std::nullopt),
                    Catch::Contains(folder.file("file/tensorboard")));
}

}  // namespace dstrain
