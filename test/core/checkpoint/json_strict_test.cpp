#include "core/checkpoint/json_strict.h"

#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

using Catch::Contains;

bool accepts(const std::string& text) {
  try {
    JsonReader json(text, "test");
    json.skip_value();
    json.end();
    return true;
  } catch (const DataError&) {
    return false;
  }
}

// nlohmann's parser is the reference for what is JSON. It also takes a byte-order mark, keeps the
// last of two equal keys, ends at a NUL byte and refuses numbers that no double can hold.
bool reference_accepts(const std::string& text) {
  if (text.find('\0') != text.npos || text.starts_with("\xEF\xBB\xBF")) return false;
  return nlohmann::json::accept(text);
}

}  // namespace

TEST_CASE("json_strict: values", "[json]") {
  const std::string text =
      R"( {"a": [1, -2,9223372036854775807], "b":"x\u00e9\ud83d\ude00\n\"", "c": [] , "d": {} })";
  JsonReader json(text, "test");
  std::vector<int64_t> numbers;
  std::string b;
  json.fields({{"d", [&] { json.object([](const std::string&) {}); }},
               {"a", [&] { json.array([&] { numbers.push_back(json.integer()); }); }},
               {"b", [&] { b = json.string(); }},
               {"c", [&] { json.array([] {}); }}});
  json.end();
  CHECK(numbers == std::vector<int64_t>{1, -2, INT64_MAX});
  CHECK(b == "x\xc3\xa9\xf0\x9f\x98\x80\n\"");
  CHECK(json_quote(b) == "\"x\xc3\xa9\xf0\x9f\x98\x80\\n\\\"\"");
  CHECK(json_quote(std::string("\x01", 1)) == "\"\\u0001\"");
  CHECK_THROWS_AS(json_quote("\xff"), DataError);
}

TEST_CASE("json_strict: refusals name the place", "[json]") {
  const auto error_of = [](const std::string& text, auto read) -> std::string {
    try {
      JsonReader json(text, "the file");
      read(json);
    } catch (const DataError& error) {
      return error.what();
    }
    return "nothing";
  };
  const auto fields = [](JsonReader& json) {
    json.fields({{"a", [&] { json.integer(); }}, {"b", [&] { json.string(); }}});
    json.end();
  };
  CHECK(error_of(R"({"a":1,"b":"x"})", fields) == "nothing");
  CHECK_THAT(error_of(R"({"a":1,"a":2,"b":"x"})", fields), Contains("'a' occurs twice"));
  CHECK_THAT(error_of(R"({"a":1,"c":2})", fields), Contains("'c' is unknown"));
  CHECK_THAT(error_of(R"({"a":1})", fields), Contains("'b' is missing"));
  CHECK_THAT(error_of(R"({"a":"1","b":"x"})", fields),
             Contains("expected a number") && Contains("byte 5"));
  CHECK_THAT(error_of(R"({"a":1.5,"b":"x"})", fields),
             Contains("expected an integer, found '1.5'"));
  CHECK_THAT(error_of(R"({"a":1e400,"b":"x"})", fields), Contains("expected an integer"));
  CHECK_THAT(error_of(R"({"a":9223372036854775808,"b":"x"})", fields),
             Contains("does not fit into 64 bits"));
  CHECK_THAT(error_of(R"({"a":1,"b":"x"} x)", fields), Contains("text after the end"));
  CHECK_THAT(error_of("{\"a\":1,\"b\":\"\xff\"}", fields), Contains("not valid UTF-8"));
  CHECK_THAT(error_of("\xEF\xBB\xBF{}", fields), Contains("expected an object"));
  CHECK_THAT(error_of("", fields), Contains("the text ends"));
  CHECK_THAT(error_of(std::string("{\"a\":1\0}", 8), fields), Contains("expected ',' or '}'"));
  CHECK_THAT(
      error_of("[-1]", [](JsonReader& json) { json.array([&] { json.unsigned_integer(); }); }),
      Contains("at least 0"));
}

TEST_CASE("json_strict: any value can be skipped, to a limited depth", "[json]") {
  CHECK(accepts(R"( [1.5e-3, {"a": [true, false, null, "x"]}, []] )"));
  CHECK(accepts(std::string(60, '[') + std::string(60, ']')));
  CHECK_FALSE(accepts(std::string(100000, '[')));
  CHECK_FALSE(accepts(R"({"a": {"b": 1, "b": 2}})"));
  CHECK_FALSE(accepts("tru"));
  CHECK_FALSE(accepts("1.e5"));
  CHECK_FALSE(accepts("01"));
}

TEST_CASE("json_strict: names are safe to print", "[json]") {
  CHECK(printable_name("a.b") == "'a.b'");
  CHECK(printable_name("a\nb\x1b[31m\xff") == "'a\\x0ab\\x1b[31m\\xff'");
  CHECK(printable_name(std::string(1000, 'x')).size() < 160);
}

TEST_CASE("json_strict: accepts what a reference parser accepts", "[json][fuzz]") {
  const std::string seeds[] = {R"({"k\u0041": "v\\\ud83d\ude00", "z": "\u00e9\t"})",
                               R"([0, -1, 12, 3e2, 0.5, 9223372036854775807])",
                               R"("\ud800\udc00 \b\f\n\r\t\/ é 𝄞")",
                               "-0",
                               "18446744073709551615",
                               R"({"a":[true, {"b": null}], "c":false})"};
  const std::string alphabet =
      "{}[]\",:\\/bfnrtu0123456789abcdefdD8-+.eE \n\t\xc3\xa9\xed\xa0\x80\xf4\x90\x01";
  int accepted = 0;
  for (uint64_t i = 0; i < 40000; ++i) {
    std::string text = seeds[random_u64(1, 1, i) % std::size(seeds)];
    const uint64_t edits = random_u64(1, 2, i) % 4;
    for (uint64_t e = 0; e < edits; ++e) {
      const uint64_t r = random_u64(1, 3 + e, i);
      const size_t at = r % text.size();
      const char c = alphabet[(r >> 20) % alphabet.size()];
      switch ((r >> 40) % 3) {
        case 0:
          text[at] = c;
          break;
        case 1:
          text.insert(at, 1, c);
          break;
        default:
          if (text.size() > 1) text.erase(at, 1);
      }
    }
    CAPTURE(text);
    const bool reference = reference_accepts(text), ours = accepts(text);
    if (ours != reference) {
      const bool duplicate_key = text[0] == '{' && reference,
                 huge_number = text.find_first_of("eE") != text.npos && ours;
      CHECK((duplicate_key || huge_number));
    }
    accepted += ours;
  }
  CHECK(accepted > 2000);
}

}  // namespace dstrain
