// UTF-8 repair, character classes and NFC.
#include <algorithm>
#include <string>

#include "core/data/unicode.h"
#include "core/data/unicode_nfc.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

std::string repair(std::string_view text, int64_t& count) {
  std::string buffer;
  count = 0;
  return std::string(replace_invalid_utf8(text, buffer, count));
}

std::string nfc(std::string_view text) {
  std::string buffer;
  return std::string(normalize_nfc(text, buffer));
}

std::string utf8(std::initializer_list<char32_t> code_points) {
  std::string text;
  for (const char32_t c : code_points) append_utf8(c, text);
  return text;
}

}  // namespace

TEST_CASE("unicode: maximal invalid subsequences become one U+FFFD each", "[tokenizer]") {
  struct Case {
    std::string text;
    int64_t replaced;
    std::string expected;
  };
  const std::string r = "\xEF\xBF\xBD";
  const Case cases[] = {
      {"", 0, ""},
      {"plain", 0, "plain"},
      {"\xC3\xA9\xE4\xBD\xA0\xF0\x9F\x98\x80", 0, "\xC3\xA9\xE4\xBD\xA0\xF0\x9F\x98\x80"},
      {"\x80", 1, r},
      {"\xC0\xAF", 2, r + r},                  // overlong
      {"\xE0\x80\xAF", 3, r + r + r},          // overlong
      {"\xED\xA0\x80", 3, r + r + r},          // surrogate
      {"\xF4\x90\x80\x80", 4, r + r + r + r},  // above U+10FFFF
      {"\xF5", 1, r},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF"
       "A",
       4, r + r + r + r + "A"},       // the standard's table 3-11
      {"a\xF0\x9F\x98", 1, "a" + r},  // cut at the end
      {"\xE4\xBD"
       "a",
       1, r + "a"},
      {"12345678\xFF"
       "12345678",
       1, "12345678" + r + "12345678"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.text);
    int64_t count = 0;
    CHECK(repair(c.text, count) == c.expected);
    CHECK(count == c.replaced);
  }
}

TEST_CASE("unicode: repaired text is valid and repairing is idempotent", "[tokenizer]") {
  uint32_t state = 12345;
  const auto random = [&state] { return state = state * 1664525 + 1013904223, state >> 24; };
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    for (uint32_t i = random() % 24; i > 0; --i) text.push_back(static_cast<char>(random()));
    int64_t count = 0, again = 0;
    const std::string fixed = repair(text, count);
    CHECK(valid_utf8_prefix(fixed) == fixed.size());
    CHECK(repair(fixed, again) == fixed);
    CHECK(again == 0);
    CHECK((count == 0) == (fixed == text));
  }
}

TEST_CASE("unicode: encoding and decoding a code point", "[tokenizer]") {
  for (const char32_t c :
       {U'\0', U'a', U'\x7F', U'\x80', U'\x7FF', U'\x800', U'\xFFFF', U'\x10000', U'\x10FFFF'}) {
    const std::string text = utf8({c});
    CHECK(decode_utf8(text.data()).code_point == c);
    CHECK(decode_utf8(text.data()).length == static_cast<int>(text.size()));
    CHECK(previous_utf8(text.data() + text.size()) == text.data());
  }
}

TEST_CASE("unicode: classes of sample characters", "[tokenizer]") {
  CHECK(char_classes('a') == (kLetter | kWord));
  CHECK(char_classes('_') == (kPunct | kWord));
  CHECK(char_classes('$') == kSymbol);
  CHECK(char_classes('\n') == kSpace);
  CHECK(char_classes(0x3000) == kSpace);
  CHECK(char_classes(0x180E) == 0);  // no whitespace since Unicode 6.3
  CHECK(char_classes(0x00BD) == kNumber);
  CHECK((char_classes(0x0301) & kMark) != 0);
  CHECK(char_classes(0x200D) == kWord);
  CHECK(char_classes(0x1C89) == (kLetter | kWord));  // new in Unicode 16
  CHECK(char_classes(0xD800) == 0);
  CHECK(char_classes(0x10FFFF) == 0);
}

TEST_CASE("unicode: NFC composes, reorders and leaves the rest alone", "[tokenizer]") {
  CHECK(nfc("") == "");
  CHECK(nfc("plain text") == "plain text");
  CHECK(nfc("A\u030A") == "\u00C5");
  CHECK(nfc("\u212B") == "\u00C5");  // a singleton
  CHECK(nfc("x e\u0301 y") == "x \u00E9 y");
  CHECK(nfc("a\u0301\u0323") == "\u1EA1\u0301");  // the lower mark composes first
  CHECK(nfc("\u1100\u1161\u11A8") == "\uAC01");   // Hangul
  CHECK(nfc("\uAC00\u11A8") == "\uAC01");
  CHECK(nfc("\uAC00\u11A7") == "\uAC00\u11A7");  // that is no tail
  CHECK(nfc("\u0958") == "\u0915\u093C");        // excluded from composition
  CHECK(nfc("\u0301\u0301") == "\u0301\u0301");  // marks without a starter
  CHECK(nfc("\u0344") == "\u0308\u0301");
  CHECK(nfc("a\u0338\u0301\u0338") == "\u00E1\u0338\u0338");
  CHECK(nfc("\u1E9B\u0323") == "\u1E9B\u0323");
  CHECK(nfc(utf8({0x11935, 0x11930})) == utf8({0x11935, 0x11930}));  // Unicode 13: not known to it
}

TEST_CASE("unicode: NFC handles long runs of marks", "[tokenizer]") {
  std::string text = "a";
  for (int i = 0; i < 100000; ++i) text += i % 2 == 0 ? "\u0301" : "\u0323";
  const std::string normal = nfc(text);
  CHECK(normal.size() == 3 + 2 * (100000 - 1));  // one mark joined the letter
  CHECK(nfc(normal) == normal);
}

TEST_CASE("unicode: text for messages", "[tokenizer]") {
  CHECK(printable("a\nb\x1B[0m") == "a\\x0Ab\\x1B[0m");
  CHECK(printable("\xFFz") == "\uFFFDz");
  CHECK(printable("\u00e9\u00e9\u00e9", 3) == "\u00e9...");
}

}  // namespace dstrain
