// tokenizer train, encode and decode as a user runs them.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>

#include "apps/commands.h"
#include "core/base/error.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

// A folder that takes the place of standard input and output while a command runs.
class Sandbox {
 public:
  Sandbox() { REQUIRE(mkdtemp(folder_) != nullptr); }
  ~Sandbox() { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return std::string(folder_) + "/" + name; }
  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(path(name), std::ios::binary) << text;
    return path(name);
  }
  std::string read(const std::string& name) const {
    std::ostringstream text;
    text << std::ifstream(path(name), std::ios::binary).rdbuf();
    return text.str();
  }

  // What the command prints, given `input`.
  std::string run(const std::function<int()>& command, const std::string& input = "") const {
    write("input", input);
    std::fflush(stdout);
    const int saved_in = dup(0), saved_out = dup(1);
    const int in = open(path("input").c_str(), O_RDONLY);
    const int out = open(path("output").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(in, 0);
    dup2(out, 1);
    std::clearerr(stdin);
    const auto restore = [&] {
      std::fflush(stdout);
      dup2(saved_in, 0);
      dup2(saved_out, 1);
      for (const int fd : {saved_in, saved_out, in, out}) close(fd);
    };
    int code = -1;
    try {
      code = command();  // not inside CHECK, which would take the exception
    } catch (...) {
      restore();
      throw;
    }
    restore();
    CHECK(code == 0);
    return read("output");
  }

 private:
  char folder_[32] = "/tmp/dstrain_cmd_tok_XXXXXX";
};

}  // namespace

TEST_CASE("tokenizer commands: train, encode and decode", "[tokenizer]") {
  Sandbox box;
  const std::string corpus = box.write("text.txt", "low lower lowest new newer newest wide wider");
  const std::string tokenizer = box.path("tokenizer.json");
  TokenizerTrainOptions train;
  train.inputs = {corpus};
  train.vocab_size = 260;
  train.output = tokenizer;
  CHECK_THAT(box.run([&] { return cmd_tokenizer_train(train); }),
             Catch::Contains("260 tokens") && Catch::Contains("8 words"));
  CHECK(std::filesystem::exists(tokenizer));

  // "l" "o" -> 257, "w" "e" -> 258, "lo" "w" or "n" "e" next; the text comes back in any case.
  TokenizerCodeOptions code{.tokenizer = tokenizer, .text = "low <|endoftext|> lower"};
  const std::string ids = box.run([&] { return cmd_tokenizer_encode(code); });
  CHECK_THAT(ids, Catch::EndsWith("\n"));
  code.text = ids;
  CHECK(box.run([&] { return cmd_tokenizer_decode(code); }) == "low <|endoftext|> lower\n");
  code.text = "[0, 1,\n2]";
  CHECK(box.run([&] { return cmd_tokenizer_decode(code); }) == "<|endoftext|>!\"\n");
  code.text = "";
  CHECK(box.run([&] { return cmd_tokenizer_encode(code); }) == "\n");
}

TEST_CASE("tokenizer commands: standard input comes back byte for byte", "[tokenizer]") {
  Sandbox box;
  TokenizerTrainOptions train;
  train.inputs = {box.write("text.txt", "some text")};
  train.vocab_size = 258;
  train.output = box.path("tokenizer.json");
  train.pattern = "deepseek_v3";
  train.special_tokens = {"<s>"};
  box.run([&] { return cmd_tokenizer_train(train); });
  const TokenizerCodeOptions code{.tokenizer = train.output, .text = std::nullopt};
  const std::string text = "line\r\n\n  <s>\u4f60\u597d 12345\tend\n";
  const std::string ids = box.run([&] { return cmd_tokenizer_encode(code); }, text);
  CHECK(box.run([&] { return cmd_tokenizer_decode(code); }, ids) == text);
}

TEST_CASE("tokenizer train: folders on the way to its output are made", "[tokenizer]") {
  Sandbox box;
  TokenizerTrainOptions train;
  train.inputs = {box.write("text.txt", "some")};
  train.vocab_size = 257;
  train.output = box.path("new/folder/tokenizer.json");
  CHECK_THAT(box.run([&] { return cmd_tokenizer_train(train); }),
             Catch::Contains("257 tokens") && Catch::Contains("(1 word, 1 of them distinct)"));
  CHECK(std::filesystem::exists(train.output));
}

TEST_CASE("tokenizer commands: mistakes", "[tokenizer]") {
  Sandbox box;
  TokenizerTrainOptions train;
  train.inputs = {box.write("text.txt", "some text")};
  train.vocab_size = 258;
  train.output = box.path("tokenizer.json");
  box.run([&] { return cmd_tokenizer_train(train); });
  for (const char* ids : {"x", "1 -1", "258", "99999999999999999999", "1.5", "0x1"}) {
    CAPTURE(ids);
    const TokenizerCodeOptions code{.tokenizer = train.output, .text = ids};
    CHECK_THROWS_AS(box.run([&] { return cmd_tokenizer_decode(code); }), UsageError);
  }
  const TokenizerCodeOptions missing{.tokenizer = box.path("none.json"), .text = "a"};
  CHECK_THROWS_AS(box.run([&] { return cmd_tokenizer_encode(missing); }), NotFoundError);
  train.output = box.path("text.txt/folder/tokenizer.json");  // a file is in the way
  CHECK_THROWS_WITH(box.run([&] { return cmd_tokenizer_train(train); }),
                    Catch::Contains("text.txt"));
}

}  // namespace dstrain
