// Training against Hugging Face's BpeTrainer on the same corpus, and the counting beneath it.
#include "core/data/tokenizer_train.h"

#include <filesystem>
#include <fstream>

#include "core/data/tokenizer_json.h"
#include "core/data/tokenizer_train_count.h"
#include "test/core/data/tokenizer_fixture.h"

namespace dstrain {
namespace {

using test::tokenizer_path;

class TempFolder {
 public:
  TempFolder() { REQUIRE(mkdtemp(path_) != nullptr); }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  std::string write(const std::string& name, const std::string& text) const {
    const std::string path = std::string(path_) + "/" + name;
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }

 private:
  char path_[32] = "/tmp/dstrain_train_XXXXXX";
};

BpeTrainOptions options_for(std::vector<std::string> inputs, int64_t vocab_size) {
  BpeTrainOptions options;
  options.inputs = std::move(inputs);
  options.vocab_size = vocab_size;
  return options;
}

std::string train_error(const BpeTrainOptions& options) {
  return test::error_of([&] {
    BpeTrainReport report;
    train_bpe(options, report);
  });
}

}  // namespace

TEST_CASE("tokenizer train: vocabulary and merges equal BpeTrainer's", "[tokenizer]") {
  const std::string pattern = GENERATE("gpt2", "llama3", "qwen2", "deepseek_v3");
  CAPTURE(pattern);
  auto options = options_for({tokenizer_path("small/corpus.txt")}, 1200);
  options.pattern = pattern;
  options.special_tokens = {"<|endoftext|>", "<|begin_of_text|>"};
  BpeTrainReport report;
  const TokenizerSpec trained = train_bpe(options, report);
  const TokenizerSpec expected =
      parse_tokenizer_json(test::read_text(tokenizer_path("small/" + pattern + ".json")), pattern);
  CHECK(report.vocab_size == 1200);
  CHECK(trained.model.vocab == expected.model.vocab);
  REQUIRE(trained.model.merges.size() == expected.model.merges.size());
  for (size_t i = 0; i < expected.model.merges.size(); ++i) {
    CHECK(trained.model.merges[i].left == expected.model.merges[i].left);
    CHECK(trained.model.merges[i].right == expected.model.merges[i].right);
  }
  CHECK(trained.nfc == expected.nfc);
  // The whole file is the one that Hugging Face tokenizers writes.
  const auto ours = nlohmann::json::parse(write_tokenizer_json(trained));
  const auto theirs = nlohmann::json::parse(write_tokenizer_json(expected));
  CHECK(ours == theirs);
}

TEST_CASE("tokenizer train: threads do not change the result", "[tokenizer]") {
  TempFolder folder;
  std::string text;
  const std::string corpus = test::read_text(tokenizer_path("small/corpus.txt"));
  while (text.size() < (9 << 20)) text += corpus;  // several blocks
  const std::string path = folder.write("big.txt", text);
  auto options = options_for({path}, 600);
  options.max_words = 900;  // some words are dropped, too
  std::string first;
  for (const int64_t threads : {1, 2, 3}) {
    options.threads = threads;
    BpeTrainReport report;
    const std::string json = write_tokenizer_json(train_bpe(options, report));
    if (threads == 1) first = json;
    CHECK(json == first);
    CHECK(report.text_bytes == static_cast<int64_t>(text.size()));
    CHECK(report.dropped_words > 0);
  }
}

TEST_CASE("tokenizer train: cutting a file into blocks changes no word", "[tokenizer]") {
  TempFolder folder;
  std::string text;
  const std::string corpus = test::read_text(tokenizer_path("small/corpus.txt"));
  while (text.size() < (5 << 20)) text += corpus;
  const std::string path = folder.write("big.txt", text);
  for (const char* pattern : {"gpt2", "llama3", "qwen2", "deepseek_v3"}) {
    auto options = options_for({path}, 300);
    options.pattern = pattern;
    BpeTrainReport report;
    const WordCounts counts = count_words(options, report);
    // The same text as one JSONL document is never cut.
    auto whole =
        options_for({folder.write("big.jsonl", nlohmann::json{{"text", text}}.dump() + "\n")}, 300);
    whole.pattern = pattern;
    BpeTrainReport whole_report;
    CHECK((counts == count_words(whole, whole_report)));
    CHECK(report.words == whole_report.words);
  }
}

TEST_CASE("tokenizer train: where text may be cut", "[tokenizer]") {
  const std::string tail = " 12345678";
  CHECK(safe_cut("") == 0);
  CHECK(safe_cut("ab cd") == 0);  // too near to the end to judge
  CHECK(safe_cut("ab cd" + tail) == 2);
  CHECK(safe_cut("ab\ncd" + tail) == 3);
  CHECK(safe_cut("ab\n\ncd" + tail) == 0);
  CHECK(safe_cut("ab\r\ncd" + tail) == 0);
  CHECK(safe_cut("ab  cd" + tail) == 0);
  CHECK(safe_cut("a1 2b" + tail) == 0);
  CHECK(safe_cut("\u4f60\u3002\n\u597d" + tail) == 7);
  CHECK(safe_cut("\u4f60\u3000\n\u597d" + tail) == 0);
  CHECK(safe_cut("ab\n\xE4\xBD" + tail) == 0);
  CHECK(safe_cut("\x80\n"
                 "cd" +
                 tail) == 0);
}

TEST_CASE("tokenizer train: texts, JSONL and special tokens inside them", "[tokenizer]") {
  TempFolder folder;
  const std::string text = folder.write("a.txt", "\xEF\xBB\xBFhello hello<|end|>hello");
  const std::string lines =
      folder.write("b.jsonl", "{\"text\": \"hello\"}\n\n{\"text\": \"hel\\u006co\", \"n\": 1}\n");
  auto options = options_for({text, lines}, 300);
  options.special_tokens = {"<|end|>"};
  BpeTrainReport report;
  const WordCounts counts = count_words(options, report);
  CHECK((counts == WordCounts{{" hello", 1}, {"hello", 4}}));
  CHECK(report.words == 5);
  CHECK(report.distinct_words == 2);

  BpeTrainReport trained;
  const TokenizerSpec spec = train_bpe(options, trained);
  CHECK(trained.vocab_size == 1 + 256 + 5);  // the text has no more pairs
  const Tokenizer tokenizer(spec, "trained");
  CHECK(tokenizer.encode("hello<|end|>").size() == 2);
  CHECK(tokenizer.is_special(0));

  options.min_frequency = 5;
  CHECK(static_cast<int64_t>(train_bpe(options, trained).model.merges.size()) == 4);
}

TEST_CASE("tokenizer train: invalid UTF-8 and endless words are counted", "[tokenizer]") {
  TempFolder folder;
  const auto options = options_for(
      {folder.write("a.txt", "ab\xFF " + std::string(kMaxWordBytes + 1, 'x') + " cd")}, 300);
  BpeTrainReport report;
  count_words(options, report);
  CHECK(report.invalid_utf8 == 1);
  CHECK(report.long_words == 1);
}

TEST_CASE("tokenizer train: mistakes get a sentence", "[tokenizer]") {
  TempFolder folder;
  const std::string text = folder.write("a.txt", "some text");
  auto options = options_for({text}, 100);
  CHECK_THAT(train_error(options), Catch::Contains("vocabulary size 100 is out of range"));
  options.vocab_size = int64_t{1} << 40;
  CHECK_THAT(train_error(options), Catch::Contains("out of range"));
  options = options_for({text}, 300);
  options.special_tokens = {"<a>", "<a>"};
  CHECK_THAT(train_error(options), Catch::Contains("'<a>' is given twice"));
  options.special_tokens = {""};
  CHECK_THAT(train_error(options), Catch::Contains("is empty"));
  options.special_tokens = {"a"};
  CHECK_THAT(train_error(options), Catch::Contains("stands for a byte"));
  options.special_tokens = {"\xFF\xFF"};
  CHECK_THAT(train_error(options), Catch::Contains("not valid UTF-8"));
  options = options_for({text}, 300);
  options.pattern = "nope";
  CHECK_THAT(train_error(options), Catch::Contains("unknown tokenizer pattern 'nope'"));
  CHECK_THAT(train_error(options_for({folder.write("empty.txt", "")}, 300)),
             Catch::Contains("hold no text"));
  CHECK_THAT(train_error(options_for({folder.write("bad.jsonl", "{\"text\": 3}\n")}, 300)),
             Catch::Contains("bad.jsonl:1"));
  CHECK_THROWS_AS(
      [&] {
        BpeTrainReport report;
        train_bpe(options_for({"/no/such/file.txt"}, 300), report);
      }(),
      NotFoundError);
}

}  // namespace dstrain
