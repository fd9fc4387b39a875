#include "core/data/build.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/data/build_journal.h"
#include "test/core/data/token_dataset_fixture.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

using Catch::Contains;
using test::TempFolder;
namespace fs = std::filesystem;

// A byte is a token; 256 ends a document.
BuildTokenizer byte_tokenizer(int64_t eos_id = 256) {
  BuildTokenizer tokenizer;
  tokenizer.make_encoder = []() -> EncodeText {
    return [](std::string_view text, std::vector<int32_t>& ids) {
      for (char c : text) ids.push_back(static_cast<unsigned char>(c));
      return int64_t{0};
    };
  };
  tokenizer.vocab_size = 257;
  tokenizer.eos_id = eos_id;
  tokenizer.path = "bytes.json";
  tokenizer.fingerprint = 1234;
  return tokenizer;
}

// The documents of a dataset as text; "|" stands for the end of one.
std::string dataset_text(const std::string& folder) {
  const TokenDataset dataset = TokenDataset::open(folder);
  std::string text;
  for (int64_t d = 0; d < dataset.num_documents(); ++d) {
    const TokenRange range = dataset.document_range(d);
    std::vector<int32_t> ids(static_cast<size_t>(range.count()));
    dataset.read(range.begin, range.count(), ids.data());
    for (int32_t id : ids) text += id == 256 ? '|' : static_cast<char>(id);
  }
  return text;
}

struct Fixture {
  TempFolder temp;
  BuildOptions options;

  Fixture() {
    options.output = temp / "out";
    options.workers = 2;
  }
  std::string input(const std::string& name, const std::string& text) {
    test::write_bytes(temp / name, text);
    options.inputs.push_back(temp / name);
    return temp / name;
  }
  BuildReport build() { return build_dataset(options, byte_tokenizer()); }
  std::string built_text() {
    options.overwrite = true;
    build();
    return dataset_text(options.output);
  }
};

// Several blocks and chunks of lines, some empty, some long.
std::string many_lines(uint64_t seed, int64_t lines) {
  std::string text;
  for (int64_t i = 0; i < lines; ++i) {
    const uint64_t r = random_u64(seed, 0, static_cast<uint64_t>(i));
    if (r % 5 != 0)
      text += std::to_string(i) + std::string(r / 5 % 300, static_cast<char>('a' + r % 26));
    text += '\n';
  }
  return text;
}

TEST_CASE("build: the ways to split text") {
  Fixture f;
  f.input("a.txt", "\xEF\xBB\xBFone\ntwo\r\n\r\n \t\nthree\nfour\n\n\n");
  f.input("b.txt", "five");
  f.options.split = TextSplit::file;
  CHECK(f.built_text() == "one\ntwo\r\n\r\n \t\nthree\nfour\n\n\n|five|");
  f.options.split = TextSplit::line;
  CHECK(f.built_text() == "one|two|three|four|five|");
  f.options.split = TextSplit::blank_line;
  CHECK(f.built_text() == "one\ntwo|three\nfour|five|");
}

TEST_CASE("build: JSONL documents, and what the report and the manifest say") {
  Fixture f;
  f.input("a.jsonl",
          "{\"id\": {\"text\": \"no\"}, \"text\": \"caf\\u00e9\"}\n\n{\"text\": \"\"}\n"
          "{\"text\": \"two\\nlines\", \"more\": [1, [2]]}");
  const BuildReport report = f.build();
  CHECK(report.documents == 2);
  CHECK(report.empty_documents == 1);
  CHECK(report.text_bytes == 14);
  CHECK(report.tokens == 16);
  CHECK(dataset_text(f.options.output) == "caf\xC3\xA9|two\nlines|");
  const TokenDataset dataset = TokenDataset::open(f.options.output);
  CHECK(dataset.text_bytes() == 14);
  CHECK(dataset.eos_id() == 256);
  CHECK(dataset.tokenizer_fingerprint() == 1234);
  CHECK(dataset.content_hash() == report.content_hash);
  CHECK(manifest_tokenizer(f.options.output) == "bytes.json");
  CHECK_FALSE(fs::exists(f.options.output + ".partial"));
}

TEST_CASE("build: bad JSONL names file, line and reason") {
  struct Case {
    const char* line;
    const char* expected;
  };
  for (const Case& c : std::initializer_list<Case>{
           {"{\"text\": \"x\"", "not valid JSON"},
           {"nonsense", "not valid JSON"},
           {"[1]", "expected a JSON object"},
           {"\"text\"", "expected a JSON object"},
           {"{\"body\": \"x\"}", "has no field \"text\"; name the one"},
           {"{\"text\": 3}", "is a number, expected a string"},
           {"{\"text\": null}", "is null, expected a string"},
           {"{\"text\": [\"x\"]}", "is a list, expected a string"},
           {"{\"text\": {\"text\": \"x\"}}", "is an object, expected a string"},
           {"{\"text\": \"x\", \"text\": \"y\"}", "2 times"},
           {"{\"text\": \"\\ud800\"}", "not valid JSON"},
           {"{\"text\": \"x\"} {\"text\": \"y\"}", "not valid JSON"}}) {
    Fixture f;
    f.input("a.jsonl", std::string("{\"text\": \"fine\"}\n\n") + c.line + "\n");
    CAPTURE(c.line);
    CHECK_THROWS_WITH(f.build(), Contains("a.jsonl:3:") && Contains(c.expected));
  }
  Fixture deep;
  deep.input("a.jsonl", "{\"text\": " + std::string(1000000, '[') + "\n");
  CHECK_THROWS_WITH(deep.build(), Contains("a.jsonl:1"));
}

TEST_CASE("build: the result does not depend on the number of workers") {
  Fixture f;
  f.input("a.txt", many_lines(1, 20000));
  f.input("b.txt", many_lines(2, 3000));
  f.options.split = TextSplit::line;
  f.options.workers = 1;
  f.options.shard_bytes = 1 << 20;
  f.build();
  const std::string expected = test::folder_bytes(f.options.output);
  CHECK(TokenDataset::open(f.options.output).num_shards() > 3);
  for (int64_t workers : {2, 3, 7}) {
    f.options.output = f.temp / ("out" + std::to_string(workers));
    f.options.workers = workers;
    f.options.commit_bytes = 100000 * workers;
    f.build();
    CHECK(test::folder_bytes(f.options.output) == expected);
  }
}

TEST_CASE("build: killed at any moment, it goes on and gives the same bytes") {
  Fixture f;
  f.input("a.txt", many_lines(3, 12000));
  f.input("b.jsonl", "{\"text\": \"between\"}\n");
  f.input("c.txt", many_lines(4, 6000));
  f.options.split = TextSplit::line;
  f.options.shard_bytes = 1 << 19;
  f.options.block_bytes = 1 << 12;
  f.options.commit_bytes = 1 << 17;
  f.build();
  const std::string expected = test::folder_bytes(f.options.output);

  BuildTokenizer slow = byte_tokenizer();  // about 0.3 s in all
  slow.make_encoder = []() -> EncodeText {
    return [encode = byte_tokenizer().make_encoder()](std::string_view text,
                                                      std::vector<int32_t>& ids) {
      if (text.size() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
      return encode(text, ids);
    };
  };
  int resumed = 0;
  for (uint64_t trial = 0; trial < 6; ++trial) {
    f.options.output = f.temp / ("killed" + std::to_string(trial));
    for (uint64_t attempt = 0; attempt < 3; ++attempt) {
      const pid_t child = ::fork();
      if (child == 0) {
        try {
          build_dataset(f.options, slow);
        } catch (...) {
          ::_exit(1);
        }
        ::_exit(0);
      }
      const int64_t delay = static_cast<int64_t>(random_u64(9, trial, attempt) % 120);
      std::this_thread::sleep_for(std::chrono::milliseconds(delay));
      // The last attempt lives until there is something to go on from, on a slow machine too.
      const auto has_record = [&] {
        return fs::exists(f.options.output + ".partial/progress.json") ||
               fs::exists(f.options.output);
      };
      for (int wait = 0; attempt == 2 && wait < 20000 && !has_record(); ++wait)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ::kill(child, SIGKILL);
      int status = 0;
      ::waitpid(child, &status, 0);
      CHECK((WIFSIGNALED(status) || WEXITSTATUS(status) == 0));
    }
    const BuildReport report = f.build();
    resumed += report.resumed_text_bytes > 0;
    REQUIRE(test::folder_bytes(f.options.output) == expected);
    CHECK_FALSE(fs::exists(f.options.output + ".partial"));
  }
  CHECK(resumed > 0);
}

TEST_CASE("build: a resumed build names the same line") {
  Fixture f;
  std::string text;
  for (int i = 0; i < 40000; ++i) text += "{\"text\": \"line " + std::to_string(i) + "\"}\n";
  const std::string path = f.input("a.jsonl", text + "{\"text\": 1}\n");
  f.options.commit_bytes = 1 << 16;
  for (int run = 0; run < 2; ++run) CHECK_THROWS_WITH(f.build(), Contains("a.jsonl:40001:"));
  const std::optional<BuildProgress> progress = load_progress(f.options.output + ".partial");
  REQUIRE(progress);
  CHECK(progress->position.line == progress->written.documents + 1);
  CHECK(progress->position.line > 1);
}

TEST_CASE("build: killed after the last record, it only publishes") {
  Fixture f;
  const std::string path = f.input("a.txt", "hello");
  f.build();
  const std::string expected = test::folder_bytes(f.options.output);
  BuildProgress progress;  // as the killed build would have left it
  progress.plan = plan_hash({path}, f.options, byte_tokenizer());
  progress.position = {1, 0, 1, 0};
  progress.written = {6, 1};
  progress.text_bytes = 5;
  progress.input_hashes = {hash_input(path)};
  fs::rename(f.options.output, f.options.output + ".partial");
  save_progress(f.options.output + ".partial", progress);
  test::write_bytes(f.options.output + ".partial/progress.json.tmp-123", "torn");
  const BuildReport report = f.build();
  CHECK(report.resumed_text_bytes == 5);
  CHECK(test::folder_bytes(f.options.output) == expected);
}

TEST_CASE("build: an unfinished folder that cannot be used is built afresh") {
  Fixture f;
  f.input("a.txt", many_lines(5, 4000));
  f.options.split = TextSplit::line;
  f.build();
  const std::string expected = test::folder_bytes(f.options.output);
  const std::string partial = f.options.output + ".partial";
  fs::remove_all(f.options.output);
  BuildProgress lying;
  lying.plan = plan_hash(f.options.inputs, f.options, byte_tokenizer());
  lying.written = {1000, 10};
  lying.position = {0, 1000, 8, 0};
  for (int damage = 0; damage < 4; ++damage) {
    fs::create_directories(partial);
    save_progress(partial, lying);  // the shards it speaks of are missing
    if (damage == 1) test::write_bytes(partial + "/progress.json", "{\"plan\": 3}");
    if (damage == 2) test::write_bytes(partial + "/progress.json", "{");
    if (damage == 3) {
      BuildProgress other = lying;
      other.plan = "another";
      save_progress(partial, other);
    }
    f.build();
    CHECK(test::folder_bytes(f.options.output) == expected);
    fs::remove_all(f.options.output);
  }
}

TEST_CASE("build: up to date by content, refused if different, replaced with overwrite") {
  Fixture f;
  const std::string path = f.input("a.txt", "hello");
  CHECK_FALSE(f.build().up_to_date);
  const std::string before = test::folder_bytes(f.options.output);
  CHECK(f.build().up_to_date);
  fs::last_write_time(path, fs::last_write_time(path) + std::chrono::hours(1));
  const BuildReport again = f.build();
  CHECK(again.up_to_date);
  CHECK(again.tokens == 6);
  CHECK(test::folder_bytes(f.options.output) == before);

  f.options.split = TextSplit::line;
  CHECK_THROWS_WITH(f.build(), Contains("built with split \"file\"") && Contains("--overwrite"));
  f.options.split = TextSplit::file;
  test::write_bytes(path, "other");
  CHECK_THROWS_WITH(f.build(), Contains("it was built from another"));
  BuildTokenizer tokenizer = byte_tokenizer();
  tokenizer.fingerprint = 1;
  CHECK_THROWS_WITH(build_dataset(f.options, tokenizer), Contains("another tokenizer"));
  CHECK(test::folder_bytes(f.options.output) == before);

  CHECK(f.built_text() == "other|");
  CHECK_FALSE(fs::exists(f.options.output + ".partial"));
}

TEST_CASE("build: the output may not be something else") {
  Fixture f;
  f.input("a.txt", "hello");
  test::write_bytes(f.options.output, "a file");
  f.options.overwrite = true;
  CHECK_THROWS_WITH(f.build(), Contains("is not a dataset of 'data build'"));
  fs::remove(f.options.output);
  fs::create_directories(f.options.output);
  test::write_bytes(f.temp / "out/precious.txt", "mine");
  CHECK_THROWS_WITH(f.build(), Contains("is not a dataset of 'data build'"));
  CHECK(test::read_bytes(f.temp / "out/precious.txt") == "mine");
  fs::remove(f.temp / "out/precious.txt");
  CHECK(f.build().documents == 1);  // an empty folder is taken
}

TEST_CASE("build: two builds of one output do not meet") {
  Fixture f;
  f.input("a.txt", "hello");
  BuildTokenizer outer = byte_tokenizer();
  outer.make_encoder = [&]() -> EncodeText {
    CHECK_THROWS_WITH(f.build(), Contains("another 'data build' is writing"));
    return byte_tokenizer().make_encoder();
  };
  f.options.workers = 1;
  CHECK(build_dataset(f.options, outer).documents == 1);
}

TEST_CASE("build: inputs that cannot be used get a sentence before any work") {
  Fixture f;
  const auto error_of = [&](const std::string& input) {
    f.options.inputs = {input};
    return std::string([&] {
      try {
        f.build();
      } catch (const Error& error) {
        return std::string(error.what());
      }
      return std::string();
    }());
  };
  CHECK_THAT(error_of(f.temp / "missing.txt"), Contains("missing.txt"));
  fs::create_directories(f.temp / "folder");
  CHECK_THAT(error_of(f.temp / "folder"), Contains("holds no .txt, .jsonl or .ndjson file"));
  test::write_bytes(f.temp / "empty.txt", "");
  CHECK_THAT(error_of(f.temp / "empty.txt"), Contains("the inputs hold no documents"));
  test::write_bytes(f.temp / "utf16.txt", std::string("\xFF\xFEh\0i\0", 6));
  CHECK_THAT(error_of(f.temp / "utf16.txt"), Contains("UTF-16"));
  test::write_bytes(f.temp / "x.txt", "\x1F\x8B\x08 compressed");
  CHECK_THAT(error_of(f.temp / "x.txt"), Contains("gunzip"));
  REQUIRE(::mkfifo((f.temp / "pipe.txt").c_str(), 0600) == 0);
  CHECK_THAT(error_of(f.temp / "pipe.txt"), Contains("not a regular file"));
}

TEST_CASE("build: folders give their text files in order") {
  Fixture f;
  fs::create_directories(f.temp / "in/sub");
  test::write_bytes(f.temp / "in/b.txt", "2");
  test::write_bytes(f.temp / "in/a.txt", "1");
  test::write_bytes(f.temp / "in/sub/c.jsonl", "{\"text\": \"3\"}");
  test::write_bytes(f.temp / "in/readme.md", "no");
  f.options.inputs = {f.temp / "in"};
  CHECK(f.built_text() == "1|2|3|");
}

TEST_CASE("build: invalid UTF-8 is replaced and counted") {
  Fixture f;
  f.input("a.txt", "caf\xE9 \xC3\xA9 \xF0\x9F\x98");
  const BuildReport report = f.build();
  CHECK(report.replaced_sequences == 2);
  CHECK(dataset_text(f.options.output) == "caf\xEF\xBF\xBD \xC3\xA9 \xEF\xBF\xBD|");
  CHECK(report.text_bytes == 13);
}

TEST_CASE("build: without an end token documents keep their borders") {
  Fixture f;
  f.input("a.txt", "one\ntwo");
  f.options.split = TextSplit::line;
  build_dataset(f.options, byte_tokenizer(/*eos_id=*/-1));
  const TokenDataset dataset = TokenDataset::open(f.options.output);
  CHECK(dataset.num_tokens() == 6);
  CHECK(dataset.num_documents() == 2);
  CHECK(dataset.eos_id() == -1);
}

// The highest resident size of this process so far, in MiB.
int64_t peak_mib() {
  struct rusage usage;
  ::getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss / 1024;
}

TEST_CASE("build: a line without end is refused in bounded memory") {
  Fixture f;
  for (const char* name : {"a.txt", "a.jsonl"}) {
    const std::string path = f.temp / name;
    test::write_bytes(path, "{\"text\": \"");
    fs::resize_file(path, int64_t{1} << 30);  // a hole of zeros
    f.options.inputs = {path};
    const int64_t before = peak_mib();
    for (TextSplit split : {TextSplit::line, TextSplit::blank_line, TextSplit::file}) {
      f.options.split = split;
      CHECK_THROWS_WITH(f.build(), Contains(std::string(name) + ":1: the document that starts here "
                                                                "is longer than 64 MiB"));
    }
    CHECK(peak_mib() - before < 700);  // far below the line of 1 GiB, under sanitizers too
  }
}

TEST_CASE("build: a document of exactly the limit is taken, one byte more is not") {
  Fixture f;
  const std::string path = f.input("a.txt", "");
  f.options.split = TextSplit::line;
  BuildTokenizer tokenizer = byte_tokenizer();
  tokenizer.make_encoder = []() -> EncodeText {
    return [](std::string_view text, std::vector<int32_t>& ids) {
      ids.push_back(static_cast<int32_t>(text.size() >> 20));
      return int64_t{0};
    };
  };
  std::string line(static_cast<size_t>(kMaxDocumentBytes), 'x');
  test::write_bytes(path, "a\n" + line + "\n");
  CHECK(build_dataset(f.options, tokenizer).documents == 2);
  f.options.overwrite = true;
  test::write_bytes(path, "a\n" + line + "x\n");
  CHECK_THROWS_WITH(build_dataset(f.options, tokenizer), Contains("a.txt:2: the document"));
}

TEST_CASE("build: a full disk keeps what is done, and the next run goes on") {
  Fixture f;
  f.input("a.txt", many_lines(6, 10000));
  f.options.split = TextSplit::line;
  f.options.commit_bytes = 1 << 17;
  struct rlimit old;
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small = {1 << 20,
                               old.rlim_max};  // a write beyond it fails, as on a full disk
  ::setrlimit(RLIMIT_FSIZE, &small);
  std::string text;
  try {
    f.build();
  } catch (const StorageError& error) {
    text = error.what();
  }
  ::setrlimit(RLIMIT_FSIZE, &old);
  ::signal(SIGXFSZ, old_handler);
  CHECK_THAT(text, Contains("tokens-00000.bin") && Contains("the same command goes on from there"));
  CHECK(f.build().resumed_text_bytes > 0);
  const std::string resumed = test::folder_bytes(f.options.output);
  f.options.output = f.temp / "fresh";
  f.build();
  CHECK(test::folder_bytes(f.options.output) == resumed);
}

}  // namespace
}  // namespace dstrain
