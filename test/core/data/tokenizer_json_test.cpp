// Damaged and unsupported tokenizer.json files: each gets a sentence with the JSON path.
#include "core/data/tokenizer_json.h"

#include <functional>

#include "core/data/tokenizer.h"
#include "test/core/data/tokenizer_fixture.h"

namespace dstrain {
namespace {

using nlohmann::json;

// A whole file, small: the 256 bytes, two merges, one special token.
json small_file() {
  json vocab = json::object();
  std::vector<std::string> alphabet;
  for (char32_t c = 0; c < 0x144; ++c) {
    const bool printable = (c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xAC) || c >= 0xAE;
    if (!printable) continue;
    std::string text;
    if (c < 0x80) {
      text.push_back(static_cast<char>(c));
    } else {
      text.push_back(static_cast<char>(0xC0 | c >> 6));
      text.push_back(static_cast<char>(0x80 | (c & 0x3F)));
    }
    vocab[text] = vocab.size();
  }
  vocab["ab"] = 256;
  vocab["abc"] = 257;
  const json flags = {{"single_word", false},
                      {"lstrip", false},
                      {"rstrip", false},
                      {"normalized", false},
                      {"special", true}};
  json token = {{"id", 258}, {"content", "<|endoftext|>"}};
  token.update(flags);
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", json::array({token})},
          {"normalizer", {{"type", "NFC"}}},
          {"pre_tokenizer",
           {{"type", "Sequence"},
            {"pretokenizers",
             {{{"type", "Split"},
               {"pattern", {{"Regex", "\\p{N}{1,3}"}}},
               {"behavior", "Isolated"},
               {"invert", false}},
              {{"type", "ByteLevel"},
               {"add_prefix_space", false},
               {"trim_offsets", true},
               {"use_regex", true}}}}}},
          {"post_processor", nullptr},
          {"decoder",
           {{"type", "ByteLevel"},
            {"add_prefix_space", true},
            {"trim_offsets", true},
            {"use_regex", true}}},
          {"model",
           {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"a b", json::array({"ab", "c"})}}}}};
}

std::string error_of(const std::string& text) {
  return test::error_of([&] { Tokenizer::parse(text, "tok.json"); });
}

std::string error_with(const std::function<void(json&)>& change) {
  json file = small_file();
  change(file);
  return error_of(file.dump());
}

}  // namespace

TEST_CASE("tokenizer json: the small file is a tokenizer", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::parse(small_file().dump(), "tok.json");
  CHECK(tokenizer.vocab_size() == 259);
  CHECK(tokenizer.encode("abc<|endoftext|>") == std::vector<int32_t>{257, 258});
  CHECK(tokenizer.decode(std::vector<int32_t>{257, 258, 256}) == "abc<|endoftext|>ab");
}

TEST_CASE("tokenizer json: what is wrong is named with its path", "[tokenizer]") {
  struct Case {
    const char* expected;
    std::function<void(json&)> change;
  };
  const Case cases[] = {
      {"$ has the key 'extra'", [](json& f) { f["extra"] = 1; }},
      {"$.version is \"2.0\"", [](json& f) { f["version"] = "2.0"; }},
      {"$.model is missing", [](json& f) { f.erase("model"); }},
      {"$.model must be an object, but is [1]", [](json& f) { f["model"] = {1}; }},
      {"$.model.type is \"WordPiece\"", [](json& f) { f["model"]["type"] = "WordPiece"; }},
      {"$.model.type must be a string", [](json& f) { f["model"]["type"] = 3; }},
      {"$.model has the key 'x'", [](json& f) { f["model"]["x"] = 1; }},
      {"$.model.dropout is 0.1", [](json& f) { f["model"]["dropout"] = 0.1; }},
      {"$.model.byte_fallback is true", [](json& f) { f["model"]["byte_fallback"] = true; }},
      {"$.model.end_of_word_suffix is \"</w>\"",
       [](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }},
      {"$.model.unk_token is '?unk'", [](json& f) { f["model"]["unk_token"] = "?unk"; }},
      {"$.model.fuse_unk must be true or false", [](json& f) { f["model"]["fuse_unk"] = 1; }},
      {"$.model.vocab must be an object", [](json& f) { f["model"]["vocab"] = 1; }},
      {"$.model.vocab must be an object", [](json& f) { f["model"].erase("vocab"); }},
      {"has no tokens",
       [](json& f) {
         f["model"] = {{"vocab", json::object()}, {"merges", json::array()}};
       }},
      {"gives the id 256 to", [](json& f) { f["model"]["vocab"]["abc"] = 256; }},
      {"has the id -1 for the token 'abc'", [](json& f) { f["model"]["vocab"]["abc"] = -1; }},
      {"has the id 99999999999 for", [](json& f) { f["model"]["vocab"]["abc"] = 99999999999; }},
      {"has the id 16777216 for", [](json& f) { f["model"]["vocab"]["abc"] = 16777216; }},
      {"has the id 1.5 for", [](json& f) { f["model"]["vocab"]["abc"] = 1.5; }},
      {"has the id \"7\" for", [](json& f) { f["model"]["vocab"]["abc"] = "7"; }},
      {"has an empty token", [](json& f) { f["model"]["vocab"][""] = 300; }},
      {"$.model.merges is missing", [](json& f) { f["model"].erase("merges"); }},
      {"$.model.merges must be a list", [](json& f) { f["model"]["merges"] = "a b"; }},
      {"$.model.merges[2] needs the token 'zz'",
       [](json& f) { f["model"]["merges"].push_back("z z"); }},
      {"$.model.merges[2] needs the token '\\x1B[31m'",
       [](json& f) { f["model"]["merges"].push_back("\x1B[31m z"); }},
      {"$.model.merges[2] must be two tokens",
       [](json& f) { f["model"]["merges"].push_back("ab"); }},
      {"$.model.merges[2] must be two tokens",
       [](json& f) { f["model"]["merges"].push_back("a b c"); }},
      {"$.model.merges[2] must be two tokens",
       [](json& f) { f["model"]["merges"].push_back(json::array({"a"})); }},
      {"$.added_tokens must be a list", [](json& f) { f["added_tokens"] = 1; }},
      {"$.added_tokens[0] must be an object", [](json& f) { f["added_tokens"][0] = 1; }},
      {"$.added_tokens[0].id is missing", [](json& f) { f["added_tokens"][0].erase("id"); }},
      {"$.added_tokens[0].id is -3", [](json& f) { f["added_tokens"][0]["id"] = -3; }},
      {"$.added_tokens[0].id is 4000000000",
       [](json& f) { f["added_tokens"][0]["id"] = 4000000000; }},
      {"$.added_tokens[0].id is 300, but Hugging Face",
       [](json& f) { f["added_tokens"][0]["id"] = 300; }},
      {"$.added_tokens[0].id is 258, but $.model.vocab gives 'ab' the id 256",
       [](json& f) { f["added_tokens"][0]["content"] = "ab"; }},
      {"$.added_tokens[0].content is empty", [](json& f) { f["added_tokens"][0]["content"] = ""; }},
      {"$.added_tokens[1].content is '<|endoftext|>' a second time",
       [](json& f) { f["added_tokens"].push_back(f["added_tokens"][0]); }},
      {"$.added_tokens[0].lstrip is missing",
       [](json& f) { f["added_tokens"][0].erase("lstrip"); }},
      {"$.normalizer is NFKC", [](json& f) { f["normalizer"]["type"] = "NFKC"; }},
      {"$.normalizer.type is missing", [](json& f) { f["normalizer"] = json::object(); }},
      {"$.normalizer.normalizers[0] is Lowercase",
       [](json& f) {
         f["normalizer"] = {{"type", "Sequence"}, {"normalizers", {{{"type", "Lowercase"}}}}};
       }},
      {"$.pre_tokenizer has no ByteLevel step", [](json& f) { f["pre_tokenizer"] = nullptr; }},
      {"$.pre_tokenizer is Whitespace",
       [](json& f) {
         f["pre_tokenizer"] = {{"type", "Whitespace"}};
       }},
      {"$.pre_tokenizer.pretokenizers[2] follows ByteLevel",
       [](json& f) {
         auto& list = f["pre_tokenizer"]["pretokenizers"];
         list.push_back(list[0]);
       }},
      {"$.pre_tokenizer.pretokenizers[0].behavior is \"Split\"",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Split"; }},
      {"$.pre_tokenizer.pretokenizers[0].behavior is missing",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][0].erase("behavior"); }},
      {"$.pre_tokenizer.pretokenizers[0].pattern must have one key",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"] = json::object(); }},
      {"split 0 of the pre-tokenizer: the pattern '(a' is not usable",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a"; }},
      {"$.post_processor is BertProcessing",
       [](json& f) {
         f["post_processor"] = {{"type", "BertProcessing"}};
       }},
      {"$.post_processor.single does not contain the text",
       [](json& f) {
         f["post_processor"] = {{"type", "TemplateProcessing"},
                                {"single", json::array()},
                                {"pair", json::array()},
                                {"special_tokens", json::object()}};
       }},
      {"$.post_processor.single[0].Sequence.id is \"B\"",
       [](json& f) {
         f["post_processor"] = {{"type", "TemplateProcessing"},
                                {"single", {{{"Sequence", {{"id", "B"}, {"type_id", 0}}}}}},
                                {"pair", json::array()},
                                {"special_tokens", json::object()}};
       }},
      {"$.post_processor.special_tokens.<s> is missing",
       [](json& f) {
         f["post_processor"] = {{"type", "TemplateProcessing"},
                                {"single", {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}}},
                                {"pair", json::array()},
                                {"special_tokens", json::object()}};
       }},
      {"$.decoder is WordPiece",
       [](json& f) {
         f["decoder"] = {{"type", "WordPiece"}};
       }},
  };
  for (const Case& c : cases) {
    CAPTURE(c.expected);
    const std::string error = error_with(c.change);
    CHECK_THAT(error, Catch::StartsWith("tok.json: "));
    CHECK_THAT(error, Catch::Contains(c.expected));
  }
}

TEST_CASE("tokenizer json: text that is no JSON", "[tokenizer]") {
  const std::string good = small_file().dump();
  CHECK_THAT(error_of(""), Catch::StartsWith("tok.json: not valid JSON at byte"));
  CHECK_THAT(error_of(good.substr(0, good.size() / 2)),
             Catch::StartsWith("tok.json: not valid JSON at byte"));
  CHECK_THAT(error_of(good + "x"), Catch::StartsWith("tok.json: not valid JSON at byte"));
  CHECK_THAT(error_of("{\"version\": \"\xFF\"}"), Catch::Contains("UTF-8"));
  CHECK_THAT(error_of("{\"version\": 1e999}"), Catch::StartsWith("tok.json: not valid JSON"));
  CHECK_THAT(error_of("[]"), Catch::Contains("$ must be an object"));
  CHECK_THAT(error_of("null"), Catch::Contains("$ must be an object"));
  CHECK_THAT(error_of(std::string(100000, '[')), Catch::StartsWith("tok.json: "));
  CHECK_THAT(error_of("{\"model\": " + std::string(40, '[') + std::string(40, ']') + "}"),
             Catch::Contains("nested deeper than 32 levels"));
  CHECK_THAT(error_of("{\"model\": 1, \"model\": 2}"), Catch::Contains("'model' appears twice"));
  std::string twice = good;
  twice.insert(twice.find("\"abc\":"), "\"abc\":7,");
  CHECK_THAT(error_of(twice), Catch::Contains("'abc' appears twice"));
}

TEST_CASE("tokenizer json: truncation and padding are ignored", "[tokenizer]") {
  json file = small_file();
  file["truncation"] = {{"max_length", 1}};
  file["padding"] = {{"strategy", "BatchLongest"}};
  CHECK(Tokenizer::parse(file.dump(), "tok.json").encode("xy").size() == 2);
}

// Thousands of damaged files: each loads or is refused, none crashes, and what loads works.
TEST_CASE("tokenizer json: mutated files never crash", "[tokenizer]") {
  const std::string good = small_file().dump();
  uint64_t state = 4711;
  const auto random = [&state](size_t bound) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<size_t>(state >> 33) % bound;
  };
  const std::string_view bytes = "{}[]\",:0123456789.-eatrufalsn\\\x00\xFF";
  int loaded = 0, refused = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string text = good;
    // Half of the changes hit the part without the long vocabulary.
    const size_t small_part = text.find("\"model\"");
    for (size_t change = 1 + random(3); change > 0; --change) {
      const size_t at = random(random(2) == 0 ? small_part : text.size());
      switch (random(5)) {
        case 0:
          text[at] = bytes[random(bytes.size())];
          break;
        case 1:
          text.erase(at, 1 + random(20));
          break;
        case 2:
          text.insert(at, text.substr(random(text.size()), 1 + random(30)));
          break;
        case 3:
          text.insert(at, 1, bytes[random(bytes.size())]);
          break;
        default:
          text.resize(std::max<size_t>(at, 1));
          break;
      }
      if (text.size() < small_part + 1) break;
    }
    try {
      const Tokenizer tokenizer = Tokenizer::parse(text, "tok.json");
      const std::vector<int32_t> ids = tokenizer.encode("ab abc 1234 <|endoftext|> \u00e9!");
      tokenizer.decode(ids);
      for (const int32_t id : ids) CHECK((id >= 0 && id < tokenizer.vocab_size()));
      ++loaded;
    } catch (const DataError&) {
      ++refused;
    }
  }
  CHECK(loaded > 50);
  CHECK(refused > 1000);
}

}  // namespace dstrain
