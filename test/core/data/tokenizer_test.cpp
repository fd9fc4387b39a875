// Token ids and decoded text against Hugging Face tokenizers, line by line.
#include "core/data/tokenizer.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <thread>

#include "test/core/data/tokenizer_fixture.h"

namespace dstrain {
namespace {

using nlohmann::json;
using test::tokenizer_path;

// DeepSeek's tokenizer.json has a licence of its own and is not part of the repository.
std::string find_deepseek_tokenizer() {
  if (const char* path = std::getenv("DSTRAIN_DEEPSEEK_TOKENIZER")) return path;
  const std::string beside =
      std::string(DSTRAIN_SOURCE_DIR) + "/../shared/tokenizers/deepseek_v3/tokenizer.json";
  return std::filesystem::exists(beside) ? beside : "";
}

}  // namespace

TEST_CASE("tokenizer: every id of the gpt2 references", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_path("gpt2/tokenizer.json"));
  CHECK(tokenizer.vocab_size() == 50257);
  CHECK(tokenizer.eos_id() == 50256);
  CHECK(tokenizer.bos_id() == std::nullopt);
  test::check_references(tokenizer, tokenizer_path("gpt2/refs.jsonl"));
}

TEST_CASE("tokenizer: every id of the deepseek v3 references", "[tokenizer]") {
  const std::string path = find_deepseek_tokenizer();
  if (path.empty()) {
    WARN(
        "SKIPPED: tokenizer: every id of the deepseek v3 references: no tokenizer.json; set "
        "DSTRAIN_DEEPSEEK_TOKENIZER to its path");
    return;
  }
  const Tokenizer tokenizer = Tokenizer::load(path);
  CHECK(tokenizer.vocab_size() == 128815);
  CHECK(tokenizer.bos_id() == 0);
  CHECK(tokenizer.eos_id() == 1);
  test::check_references(tokenizer, tokenizer_path("deepseek_v3/refs.jsonl"));
}

TEST_CASE("tokenizer: every id with each pattern over all of Unicode", "[tokenizer]") {
  const std::string name = GENERATE("gpt2", "llama3", "qwen2", "deepseek_v3");
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_path("small/" + name + ".json"));
  test::check_references(tokenizer, tokenizer_path("small/" + name + ".jsonl"));
}

TEST_CASE("tokenizer: variants of one file give the reference ids", "[tokenizer]") {
  const json base = json::parse(test::read_text(tokenizer_path("small/qwen2.json")));
  for (const json& variant : test::read_json_lines(tokenizer_path("small/variants.jsonl"))) {
    CAPTURE(variant.at("name").get<std::string>());
    json merged = base;
    for (const auto& [key, value] : variant.at("patch").items()) {
      if (key == "model") {
        merged["model"].update(value);
      } else {
        merged[key] = value;
      }
    }
    const Tokenizer tokenizer = Tokenizer::parse(merged.dump(), "variant");
    const Tokenizer reread = Tokenizer::parse(tokenizer.to_json(), "variant written and read");
    for (const json& line : variant.at("cases")) {
      const auto text = line.at(0).get<std::string>();
      CAPTURE(text);
      const auto ids = line.at(1).get<std::vector<int32_t>>();
      CHECK(tokenizer.encode(text) == ids);
      CHECK(tokenizer.encode(text, true) == line.at(2).get<std::vector<int32_t>>());
      CHECK(tokenizer.decode(ids) == line.at(3).get<std::string>());
      CHECK(reread.encode(text, true) == line.at(2).get<std::vector<int32_t>>());
      CHECK(reread.decode(ids) == line.at(3).get<std::string>());
    }
  }
}

TEST_CASE("tokenizer: saving and loading keeps everything", "[tokenizer]") {
  char folder[] = "/tmp/dstrain_tokenizer_XXXXXX";
  REQUIRE(mkdtemp(folder) != nullptr);
  const std::string path = std::string(folder) + "/tokenizer.json";
  for (const std::string name : {"gpt2/tokenizer.json", "small/deepseek_v3.json"}) {
    const Tokenizer original = Tokenizer::load(tokenizer_path(name));
    original.save(path);
    const Tokenizer copy = Tokenizer::load(path);
    CHECK(copy.vocab_size() == original.vocab_size());
    CHECK(copy.to_json() == original.to_json());
    CHECK(copy.spec().model.merges.size() == original.spec().model.merges.size());
    // The parts that decide about ids are those of the original file.
    const json before = json::parse(test::read_text(tokenizer_path(name)));
    const json after = json::parse(test::read_text(path));
    for (const char* key : {"added_tokens", "normalizer", "pre_tokenizer"})
      CHECK((before[key] == after[key] || before[key].is_null()));
    CHECK(before["model"]["vocab"] == after["model"]["vocab"]);
  }
  CHECK_THROWS_AS(Tokenizer::load(std::string(folder) + "/missing.json"), NotFoundError);
  std::filesystem::remove_all(folder);
}

TEST_CASE("tokenizer: tokens and ids look each other up", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_path("small/gpt2.json"));
  CHECK(tokenizer.vocab_size() == 1200);
  CHECK(tokenizer.token_to_id("<|endoftext|>") == 0);
  CHECK(tokenizer.eos_id() == 0);
  CHECK(tokenizer.bos_id() == 1);
  CHECK(tokenizer.is_special(1));
  CHECK_FALSE(tokenizer.is_special(2));
  CHECK(tokenizer.id_to_token(2) == "!");
  CHECK(tokenizer.id_to_token(1200) == std::nullopt);
  CHECK(tokenizer.id_to_token(-1) == std::nullopt);
  CHECK(tokenizer.token_to_id("no such token") == std::nullopt);
  // Unknown ids are skipped, special tokens on request.
  const std::vector<int32_t> ids{1, 5000, *tokenizer.token_to_id("a"), -1, 0};
  CHECK(tokenizer.decode(ids) == "<|begin_of_text|>a<|endoftext|>");
  CHECK(tokenizer.decode(ids, /*skip_special=*/true) == "a");
}

TEST_CASE("tokenizer: invalid UTF-8 is replaced and counted", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_path("small/llama3.json"));
  const std::string broken = "ab\xFF\xE4\xBD cd\xC3";
  const std::string replaced = "ab\uFFFD\uFFFD cd\uFFFD";
  std::vector<int32_t> ids;
  EncodeCounts counts;
  tokenizer.append(broken, ids, false, &counts);
  CHECK(counts.invalid_utf8 == 3);
  CHECK(counts.unknown_bytes == 0);
  CHECK(ids == tokenizer.encode(replaced));
  CHECK(tokenizer.decode(ids) == replaced);

  // A character cut in two decodes to U+FFFD; the bytes stay available.
  const std::vector<int32_t> halves = tokenizer.encode("\u00ff");
  const std::vector<int32_t> first(halves.begin(), halves.begin() + 1);
  if (halves.size() == 2) {
    CHECK(tokenizer.decode(first) == "\uFFFD");
    CHECK(tokenizer.decode_bytes(first) == "\xC3");
  }
}

TEST_CASE("tokenizer: several threads encode at once", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_path("small/qwen2.json"));
  const std::string text = test::read_text(tokenizer_path("small/corpus.txt"));
  const std::vector<int32_t> expected = tokenizer.encode(text);
  std::vector<std::vector<int32_t>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results)
    threads.emplace_back([&] {
      TokenEncoder encoder(tokenizer);
      encoder.append(text, result);
    });
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) CHECK(result == expected);
  CHECK(tokenizer.decode(expected) != "");
}

}  // namespace dstrain
