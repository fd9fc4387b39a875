// A corpus of broken job files: each must be refused with exit code 78, at the right line and
// column, with a reason and, where there is one, a hint.
#include <chrono>
#include <string>
#include <vector>

#include "core/config/config_io.h"
#include "test/support/catch.h"

using namespace dstrain;

namespace {

struct BadFile {
  std::string text;
  std::string place;   // "3:7"; empty where the file as a whole is meant
  std::string reason;  // part of the message
  std::string hint;    // part of the hint; empty = not checked
};

std::string report_of(const std::string& text) {
  try {
    parse_config_text(text, "job.yaml");
  } catch (const ConfigProblems& e) {
    CHECK(e.code() == ExitCode::bad_config);
    return e.what();
  }
  return "(accepted)";
}

// The head line of the problem at `place`.
bool has_problem(const std::string& report, const BadFile& expected) {
  const std::string start =
      expected.place.empty() ? "job.yaml: error: " : "job.yaml:" + expected.place + ": error: ";
  for (size_t at = report.find(start); at != std::string::npos; at = report.find(start, at + 1)) {
    const std::string line = report.substr(at, report.find('\n', at) - at);
    if (line.find(expected.reason) != std::string::npos) return true;
  }
  return false;
}

void check_all(const std::vector<BadFile>& files) {
  for (const BadFile& file : files) {
    const std::string report = report_of(file.text);
    CAPTURE(file.text.substr(0, 200), file.place, file.reason, file.hint, report);
    CHECK(has_problem(report, file));
    if (!file.hint.empty()) CHECK(report.find("hint: " + file.hint) != std::string::npos);
  }
}

std::string repeat(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

}  // namespace

TEST_CASE("bad yaml: what is no plain utf-8 text", "[config]") {
  const std::string nul("run:\n  name: a\0b\n", 17);
  check_all({
      {"", "", "the job file is empty", "see configs/quickstart.yaml"},
      {"# only a comment\n\n", "", "the job file is empty", ""},
      {"---\n", "", "the job file is empty", ""},
      {"\xEF\xBB\xBFrun: {name: a}\n", "1:1", "byte order mark", "save it as UTF-8 without BOM"},
      {std::string("\xFF\xFEr\0u\0n\0", 8), "1:1", "looks like UTF-16", "save it as UTF-8"},
      {std::string("\xFE\xFF\0r\0u\0n", 8), "1:1", "looks like UTF-16", ""},
      {std::string("r\0u\0n\0:\0", 8), "1:1", "looks like UTF-16", ""},
      {nul, "2:10", "NUL byte", "a job file is plain text"},
      {"run:\n  name: caf\xE9\n", "2:12", "bytes that are not UTF-8", ""},
      {"run:\n  name: \xC0\xAF\n", "2:9", "bytes that are not UTF-8", ""},
      {"run:\n  name: \xED\xA0\x80\n", "2:9", "bytes that are not UTF-8", ""},
      {"run:\n  name: a\x1B[31m\n", "2:10", "control character 0x1b", ""},
      {"run:\r  name: a\r", "1:5", "control character 0x0d", ""},
      {repeat("# filler line of a large file\n", 10000), "", "larger than 256 KiB",
       "a job file is short"},
      {repeat(std::string(1, '\0'), 1000), "1:1", "NUL byte", ""},
  });
}

TEST_CASE("bad yaml: features that are refused while scanning", "[config]") {
  std::string bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n";
  for (char c = 'b'; c < 'k'; ++c)
    bomb += std::string(1, c) + ": &" + c + " [" +
            repeat(std::string("*") + char(c - 1) + ", ", 9) + "]\n";
  check_all({
      {"run: &r {name: a}\n", "1:6", "anchors", "write the value"},
      {"data:\n  train: &x\n    - path: a\n", "2:10", "anchors", ""},
      {"a: &a [*a]\n", "1:4", "anchors", ""},
      {bomb, "1:4", "anchors", ""},
      {"run: {name: *x}\n", "1:13", "aliases", "write the value out"},
      {"run:\n  seed: !!int 3\n", "2:9", "tags", ""},
      {"run:\n  name: !!python/object:os.system x\n", "2:9", "tags", ""},
      {"run: !section {name: a}\n", "1:6", "tags", ""},
      {"run:\n  name: ! a\n", "2:9", "tags", ""},
      {"run: {name: a}\n---\nrun: {name: b}\n", "2:1", "second YAML document", ""},
      {"--- {run: {name: a}}\n---\n", "2:1", "second YAML document", ""},
      {"run:\n  <<: x\n", "2:3", "unknown key '<<'", "YAML merge keys are not supported"},
      {"a: " + repeat("[", 100) + repeat("]", 100), "1:35", "nested deeper than 32", ""},
      {"a: " + repeat("{a: ", 10000), "1:128", "nested deeper than 32", ""},
      {repeat("- ", 5000), "1:65", "nested deeper than 32", ""},
      {repeat("[", 250 * 1024), "1:1", "a key must be plain text", ""},
  });
}

TEST_CASE("bad yaml: broken syntax", "[config]") {
  check_all({
      {"run:\n\tname: a\n", "2:1", "a tab in the indentation", "YAML is indented with spaces"},
      {"run:\n  name: a\n \tseed: 1\n", "3:2", "a tab in the indentation", ""},
      {"run:\n  name: a: b\n", "2:10", "a ':' where no key can stand", "quote a value"},
      {"run:\n  name: \"abc\n", "2:9", "this quote is never closed", "end the text with \""},
      {"run:\n  name: 'it''s\n", "2:9", "this quote is never closed", "end the text with '"},
      {"run: {name: \"abc", "1:17", "the file ends inside a quoted text", "close the quote"},
      {"run:\n  name: @x\n", "2:9", "a plain value cannot begin with '@'", "quote it"},
      {"run:\n  name: `x`\n", "2:9", "a plain value cannot begin with '`'", "quote it"},
      {"run:\n  name: \"\\q\"\n", "2:12", "unknown escape character", ""},
      {"data: {train: [{path: a}\n", "2:1", "a '[' or '{' is not closed", ""},
      {"data: {train: [{path: a}]\n", "2:1", "a '[' or '{' is not closed", ""},
      {"optimizer:\n  betas: [0.9, 0.95\n", "3:1", "a '[' or '{' is not closed", ""},
      {"run\n", "1:1", "expects keys with values, got 'run'", ""},
      {"run:\n  name\n", "2:3", "run expects keys with values, got 'name'", ""},
      {"run:\n  name: a\n  seed\n", "3:3", "no ':' after 'seed'", "write 'key: value'"},
      {"run:\n  name: a\n  seed:1\n", "3:3", "no ':' after 'seed:1'", ""},
      {": a\n", "1:1", "a key is missing or null", ""},
      {"? [run]\n: a\n", "1:3", "a key must be plain text", ""},
      {"  run: {name: a}\ndata: {seq_len: 4}\n", "2:1", "indented less than the first one", ""},
      {"- run\n- data\n", "1:1", "expects keys with values, got a list", ""},
      {"]\n", "1:1", "not valid YAML", ""},
  });
}

TEST_CASE("bad yaml: keys", "[config]") {
  check_all({
      {"optimizer:\n  learning_rte: 3e-4\n", "2:3", "unknown key 'learning_rte' in 'optimizer'",
       "did you mean 'optimizer.lr'?"},
      {"optimizer:\n  weight_decya: 0.1\n", "2:3", "unknown key 'weight_decya'",
       "did you mean 'weight_decay'?"},
      {"trian: {steps: 1}\n", "1:1", "unknown key 'trian' at the top level",
       "did you mean 'train'?"},
      {"lr: 3e-4\n", "1:1", "unknown key 'lr' at the top level", "'lr' exists under 'optimizer'"},
      {"train:\n  lr: 3e-4\n", "2:3", "unknown key 'lr' in 'train'",
       "'lr' exists under 'optimizer'"},
      {"train:\n  batch_size: 3\n", "2:3", "unknown key 'batch_size'",
       "did you mean 'train.global_batch'?"},
      {"optimizer.lr: 3\n", "1:1", "unknown key 'optimizer.lr'",
       "keys are nested: write 'lr' under 'optimizer'"},
      {"run:\n  train: {steps: 3}\n", "2:3", "unknown key 'train' in 'run'",
       "'train' is a section of its own"},
      {"data:\n  train: [{path: a, wieght: 2}]\n", "2:21",
       "unknown key 'wieght' in 'data.train[0]'", "did you mean 'weight'?"},
      {"model:\n  rope_scaling: {kind: yarn}\n", "2:18",
       "unknown key 'kind' in 'model.rope_scaling'", ""},
      {"zzzzzzzzzzzzzz: 1\n", "1:1", "unknown key 'zzzzzzzzzzzzzz'", ""},
      {"run: {name: a}\nrun: {seed: 1}\n", "2:1", "key 'run' is given twice",
       "the first is in line 1"},
      {"train:\n  steps: 1\n  steps: 2\n", "3:3", "key 'steps' is given twice",
       "the first is in line 2"},
      {"data:\n  train: [{path: a, path: b}]\n", "2:21", "key 'path' is given twice", ""},
      {"run:\n", "1:1", "run is empty", "give keys below it"},
      {"run: 3\n", "1:6", "run expects keys with values, got '3'", ""},
      {"run: [a]\n", "1:6", "run expects keys with values, got a list", ""},
      {"extends: other.yaml\n", "1:1", "unknown key 'extends'", ""},  // a stamp stands for itself
  });
}

TEST_CASE("bad yaml: values", "[config]") {
  check_all({
      {"train:\n  steps: many\n", "2:10", "train.steps expects a whole number, got 'many'", ""},
      {"train:\n  steps: 010\n", "2:10", "expects a whole number, got '010'",
       "a leading zero may mean octal; write 10"},
      {"train:\n  steps: 0x10\n", "2:10", "expects a whole number", "write the decimal number"},
      {"train:\n  steps: 1_000\n", "2:10", "expects a whole number",
       "write 1000, without separators"},
      {"train:\n  steps: 1e3\n", "2:10", "expects a whole number, got '1e3'", "write 1000"},
      {"train:\n  steps: 5.0\n", "2:10", "expects a whole number, got '5.0'", "write 5"},
      {"train:\n  steps: 5.5\n", "2:10", "expects a whole number, got '5.5'", ""},
      {"train:\n  steps: \"5\"\n", "2:10", "got text in quotes", "remove the quotes"},
      {"train:\n  steps: -1\n", "2:10", "train.steps must be 0 to 1000000000000, got -1", ""},
      {"train:\n  steps: 9223372036854775808\n", "2:10", "does not fit in 64 bits", ""},
      {"train:\n  steps: -99999999999999999999\n", "2:10", "does not fit in 64 bits", ""},
      {"train:\n  steps:\n", "2:3", "train.steps expects a whole number, got nothing", ""},
      {"train:\n  steps: ~\n", "2:10", "train.steps expects a whole number, got nothing", ""},
      {"train:\n  steps: [1]\n", "2:10", "train.steps expects a whole number, got a list", ""},
      {"train:\n  steps: {a: 1}\n", "2:10", "train.steps expects a whole number, got a section",
       ""},
      {"train:\n  steps: ${STEPS}\n", "2:10", "expects a whole number, got '${STEPS}'", ""},
      {"train: {global_batch: 0}\n", "1:23", "train.global_batch must be 1 to", ""},
      {"optimizer:\n  lr: abc\n", "2:7", "optimizer.lr expects a number, got 'abc'", ""},
      {"optimizer:\n  lr: .nan\n", "2:7", "expects a number, got '.nan'", ""},
      {"optimizer:\n  lr: nan\n", "2:7", "expects a number, got 'nan'", ""},
      {"optimizer:\n  lr: .inf\n", "2:7", "expects a number, got '.inf'", ""},
      {"optimizer:\n  lr: 1e400\n", "2:7", "is out of range: '1e400' does not fit in a double", ""},
      {"optimizer:\n  lr: 1,5\n", "2:7", "expects a number, got '1,5'", ""},
      {"optimizer:\n  lr: 01.5\n", "2:7", "expects a number, got '01.5'",
       "a leading zero may mean octal; write 1.5"},
      {"optimizer:\n  lr: 5%\n", "2:7", "expects a number, got '5%'", "write the fraction"},
      {"optimizer:\n  lr: -0.1\n", "2:7", "optimizer.lr must be at least 0, got -0.1", ""},
      {"optimizer:\n  lr: 1e\n", "2:7", "expects a number, got '1e'", ""},
      {"optimizer:\n  lr: .\n", "2:7", "expects a number, got '.'", ""},
      {"optimizer:\n  eps: 0\n", "2:8", "optimizer.eps must be above 0, got 0", ""},
      {"optimizer:\n  betas: 0.9\n", "2:10", "optimizer.betas expects a list of two numbers",
       "write it as [0.9, 0.95]"},
      {"optimizer:\n  betas: [0.9]\n", "2:10", "expects a list of two numbers", ""},
      {"optimizer:\n  betas: [0.9, 0.95, 0.99]\n", "2:10", "expects a list of two numbers", ""},
      {"optimizer:\n  betas: [0.9, x]\n", "2:16", "optimizer.betas expects a number, got 'x'", ""},
      {"optimizer:\n  betas: [0.9, 1.5]\n", "2:16", "optimizer.betas must be 0 to 1, got 1.5", ""},
      {"checkpoint: {async: yes}\n", "1:21", "expects true or false, got 'yes'", "write true"},
      {"checkpoint: {async: off}\n", "1:21", "expects true or false, got 'off'", "write false"},
      {"checkpoint: {async: True}\n", "1:21", "expects true or false, got 'True'", "write true"},
      {"checkpoint: {async: 1}\n", "1:21", "expects true or false, got '1'", "write true"},
      {"checkpoint: {async: \"true\"}\n", "1:21", "expects true or false, got text in quotes",
       "remove the quotes"},
      {"model: {rope_interleave: maybe}\n", "1:26", "expects true or false, got 'maybe'", ""},
      {"schedule: {warmup: 0.05}\n", "1:20", "expects a number of steps or a percentage",
       "write 5% for that share"},
      {"schedule: {warmup: 120%}\n", "1:20", "schedule.warmup must be 0 to 100, got 120", ""},
      {"schedule: {warmup: -5}\n", "1:20", "schedule.warmup must be", ""},
      {"schedule: {warmup: some}\n", "1:20", "expects a number of steps or a percentage", ""},
      {"schedule: {warmup: \"%\"}\n", "1:20", "expects a number of steps or a percentage", ""},
      {"schedule: {name: cosin}\n", "1:18",
       "schedule.name must be constant, linear, cosine or wsd, got 'cosin'",
       "did you mean 'cosine'?"},
      {"run: {device: gpu}\n", "1:15", "run.device must be auto, cpu or cuda, got 'gpu'", ""},
      {"precision: {compute: BF16}\n", "1:22", "precision.compute must be auto, fp32, tf32 or bf16",
       ""},
      {"parallel: {data: 0}\n", "1:18", "parallel.data must be 1 to 65536, got 0", ""},
      {"parallel: {data: all}\n", "1:18", "parallel.data expects auto or a whole number, got 'all'",
       ""},
      {"parallel: {zero: 4}\n", "1:18", "parallel.zero must be 0 to 3, got 4", ""},
      {"run: {name: null}\n", "1:13", "run.name expects text, got nothing", ""},
      {"run: {name: [a]}\n", "1:13", "run.name expects text, got a list", ""},
      {"run: {name: \"a\\nb\"}\n", "1:13", "contains a control character or a line break", ""},
      {"run: {name: \"a\\0b\"}\n", "1:13", "contains a control character", ""},
      {"data: {train: data/kjv}\n", "1:15", "data.train expects a list, got 'data/kjv'",
       "write it as [{path: ..., weight: 1.0}]"},
      {"data: {train: [data/kjv]}\n", "1:16",
       "data.train[0] expects keys with values, got 'data/kjv'", ""},
      {"data: {train: [{weight: 1}]}\n", "1:16", "data.train[0] needs 'path'", ""},
      {"data: {train: [{path: a, weight: 0}]}\n", "1:34",
       "data.train[0].weight must be above 0, got 0", ""},
      {"launch: {hosts: node1}\n", "1:17", "launch.hosts expects a list, got 'node1'",
       "write it as [a, b]"},
      {"launch: {hosts: [{a: b}]}\n", "1:18", "launch.hosts[0] expects text, got a section", ""},
      {"model: {hidden_size: null}\n", "1:22",
       "model.hidden_size expects a whole number, got nothing", ""},
      {"model: {hidden_size: 1048577}\n", "1:22", "model.hidden_size must be 1 to 1048576", ""},
  });
}

TEST_CASE("bad yaml: all problems are reported at once, in order, and at most twenty in full",
          "[config]") {
  const std::string report = report_of("train: {steps: x}\nrun: {seed: -1}\nfoo: 1\n");
  const size_t first = report.find("job.yaml:1:16: error"),
               second = report.find("job.yaml:2:13: error"),
               third = report.find("job.yaml:3:1: error");
  CAPTURE(report);
  CHECK(first == 0);
  CHECK(second < third);
  CHECK(third != std::string::npos);

  std::string many;
  for (int i = 0; i < 100; ++i) many += "key" + std::to_string(i) + ": 1\n";
  const std::string capped = report_of(many);
  CHECK(capped.find("job.yaml:20:1: error") != std::string::npos);
  CHECK(capped.find("job.yaml:21:1: error") == std::string::npos);
  CHECK(capped.find("and 80 more problems") != std::string::npos);
}

TEST_CASE("bad yaml: a problem shows its line and marks the place", "[config]") {
  CHECK(report_of("optimizer:\n  weight_decya: 0.1\n") ==
        "job.yaml:2:3: error: unknown key 'weight_decya' in 'optimizer'\n"
        "    2 |   weight_decya: 0.1\n"
        "      |   ^~~~~~~~~~~~\n"
        "hint: did you mean 'weight_decay'?");
  // Columns count bytes; the caret stands under the character.
  CHECK(report_of("run: {name: \"\xC3\xA9\xC3\xA9\", seed: x}\r\n") ==
        "job.yaml:1:27: error: run.seed expects a whole number, got 'x'\n"
        "    1 | run: {name: \"\xC3\xA9\xC3\xA9\", seed: x}\n"
        "      |                         ^");
}

TEST_CASE("bad yaml: hostile sizes end quickly", "[config]") {
  std::string keys, wide = "data: {train: [";
  for (int i = 0; i < 10000; ++i) keys += "unknown" + std::to_string(i) + ": 1\n";
  for (int i = 0; i < 20000; ++i) wide += "{pth: a}, ";
  const auto start = std::chrono::steady_clock::now();
  CHECK(report_of(keys).find("and 9980 more problems") != std::string::npos);
  CHECK(report_of(wide + "]}").find("has more than 4096 elements") != std::string::npos);
  CHECK(report_of("run: {name: " + repeat("x", 200000) + ", seed: y}").size() < 1000);
  CHECK(report_of(repeat("a", 200000)).size() < 1000);
  const auto seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  CHECK(seconds < 5);  // a few hundredths of a second; sanitizers are slow
}
