// Scanners against PCRE2, and what is refused or stopped.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <chrono>
#include <unordered_map>
#include <utility>

#include "core/data/pretokenizer.h"
#include "core/data/unicode.h"
#include "test/core/data/tokenizer_fixture.h"

namespace dstrain {
namespace {

std::vector<std::string> matches(const PatternMatcher& matcher, const std::string& text) {
  const auto scratch = matcher.make_scratch();
  std::vector<std::string> found;
  PatternMatch match;
  for (const char* from = text.data();
       matcher.find(text, from, scratch.get(), match) && match.end > match.begin; from = match.end)
    found.emplace_back(match.begin, match.end);
  return found;
}

// Whether PCRE2 puts the character into the class.
bool pcre_has(const char* pattern, char32_t c) {
  static std::unordered_map<std::string, std::unique_ptr<PatternMatcher>> cache;
  auto& matcher = cache[pattern];
  if (!matcher) matcher = make_regex_matcher(pattern, "test");
  std::string text;
  append_utf8(c, text);
  const auto scratch = matcher->make_scratch();
  PatternMatch match;
  return matcher->find(text, text.data(), scratch.get(), match);
}

struct Lcg {
  uint64_t state;
  uint32_t operator()(uint32_t bound) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((state >> 33) % bound);
  }
};

// Mixed text of characters that PCRE2's Unicode version knows.
std::string random_text(Lcg& random) {
  static const char* const kParts[] = {" ",
                                       "  ",
                                       "\n",
                                       "\r\n",
                                       "\n\n",
                                       "\t",
                                       "'s",
                                       "'S",
                                       "'ll",
                                       "'Re",
                                       "'VE",
                                       "'\u017f",
                                       "'x",
                                       "''",
                                       "a",
                                       "word",
                                       "Word",
                                       "123",
                                       "12345",
                                       "1",
                                       "\u0661\u0662",
                                       "\u00bd",
                                       "!",
                                       "...",
                                       "#x",
                                       "-\n",
                                       "\u4f60\u597d",
                                       "\u9fa6",
                                       "\u3042\u30ab",
                                       "\u30fb",
                                       "\u0301",
                                       "e\u0301",
                                       "\u0947",
                                       "\u200d",
                                       "\u00a0",
                                       "\u2028",
                                       "\u3000",
                                       "\u180e",
                                       "\u0085",
                                       "\ufeff",
                                       "\u20ac",
                                       "\u2211",
                                       "_",
                                       "$",
                                       "\\",
                                       "]",
                                       "[",
                                       "^",
                                       "`",
                                       "~",
                                       "\"",
                                       "/",
                                       "\x7f",
                                       "\x01",
                                       "\U0001F600",
                                       "\U00020000",
                                       "\U0001D7D8"};
  std::string text;
  for (uint32_t i = 1 + random(14); i > 0; --i) {
    if (random(4) != 0) {
      text += kParts[random(std::size(kParts))];
      continue;
    }
    char32_t c = 0;
    do {
      const uint32_t range = random(3);
      c = range == 0 ? random(0x3000) : range == 1 ? random(0x10000) : random(0x20000);
    } while ((c >= 0xD800 && c < 0xE000) || pcre_has("\\p{Cn}", c));
    append_utf8(c, text);
  }
  return text;
}

}  // namespace

TEST_CASE("patterns: the class table agrees with PCRE2 on all characters that PCRE2 knows",
          "[tokenizer]") {
  const std::pair<const char*, uint8_t> classes[] = {{"\\p{L}", kLetter}, {"\\p{M}", kMark},
                                                     {"\\p{N}", kNumber}, {"\\p{P}", kPunct},
                                                     {"\\p{S}", kSymbol}, {"\\s", kSpace}};
  std::string known;  // every assigned character, in order
  const auto unassigned = make_regex_matcher("\\p{Cn}+", "test");
  std::string all;
  for (char32_t c = 0; c < kCodePointCount; ++c)
    if (c < 0xD800 || c >= 0xE000) append_utf8(c, all);
  const auto scratch = unassigned->make_scratch();
  PatternMatch match;
  const char* from = std::as_const(all).data();
  while (unassigned->find(all, from, scratch.get(), match)) {
    known.append(from, match.begin);
    from = match.end;
  }
  known.append(std::as_const(all).data() + (from - all.data()));
  REQUIRE(known.size() > 500000);

  for (const auto& [pattern, mask] : classes) {
    CAPTURE(pattern);
    std::string by_pcre, by_table;
    for (const std::string& run :
         matches(*make_regex_matcher(std::string(pattern) + "+", "test"), known))
      by_pcre += run;
    for (const char* p = known.data(); p < known.data() + known.size();) {
      const Utf8Char c = decode_utf8(p);
      if ((char_classes(c.code_point) & mask) != 0) by_table.append(p, c.length);
      p += c.length;
    }
    CHECK(by_pcre == by_table);
  }
}

TEST_CASE("patterns: each scanner equals PCRE2", "[tokenizer]") {
  const std::string pattern =
      GENERATE(std::string(kGpt2Pattern), std::string(kLlama3Pattern), std::string(kQwen2Pattern),
               std::string(kDeepSeekDigitsPattern), std::string(kDeepSeekCjkPattern),
               std::string(kDeepSeekTextPattern));
  CAPTURE(pattern);
  const auto scanner = make_scanner(pattern);
  const auto oracle = make_regex_matcher(pattern, "test");
  REQUIRE(scanner != nullptr);
  Lcg random{17};
  for (int i = 0; i < 4000; ++i) {
    const std::string text = random_text(random);
    CAPTURE(text);
    REQUIRE(matches(*scanner, text) == matches(*oracle, text));
  }
}

TEST_CASE("patterns: line ends may be written as characters or as escapes", "[tokenizer]") {
  std::string escaped = kDeepSeekTextPattern;
  for (const auto& [raw, text] : {std::pair{"\r", "\\r"}, std::pair{"\n", "\\n"}})
    for (size_t at = escaped.find(raw); at != escaped.npos; at = escaped.find(raw))
      escaped.replace(at, 1, text);
  CHECK(make_scanner(escaped) != nullptr);
  CHECK(make_scanner(escaped + "x") == nullptr);
}

TEST_CASE("patterns: Ruby's meaning is kept", "[tokenizer]") {
  const auto pieces = [](const char* pattern, const std::string& text) {
    return matches(*make_regex_matcher(pattern, "test"), text);
  };
  using Texts = std::vector<std::string>;
  CHECK(pieces("\\s+", "a\u180e\u0085b") == Texts{"\u0085"});
  CHECK(pieces("\\w+", "a\u00b2-\u24b6") == Texts{"a\u00b2", "\u24b6"});
  CHECK(pieces("[^a[bc]]+", "abcd") == Texts{"d"});
  CHECK(pieces("[a[-b]]+", "-ab") == Texts{"-ab"});
  CHECK(pieces("x{,2}", "xxx") == Texts{"xx", "x"});
  CHECK(pieces("x{", "x{") == Texts{"x{"});
  CHECK(pieces("\\x{4E00}\\u4e8c\\x41", "\u4e00\u4e8cA") == Texts{"\u4e00\u4e8cA"});
  CHECK(pieces("(?m:a.b)", "a\nb") == Texts{"a\nb"});
  CHECK(pieces("(?i)AB", "xab") == Texts{"ab"});
  CHECK(pieces("^b$", "a\nb\nc") == Texts{"b"});
  CHECK(pieces("[]a]+", "]a[") == Texts{"]a"});
  CHECK(pieces("\\h+|\\v", "fG\x0b") == Texts{"f", "\x0b"});
}

TEST_CASE("patterns: what would mean something else is refused", "[tokenizer]") {
  for (const char* pattern :
       {"[a&&b]", "[[:alpha:]]",   "[a[^b]]", "a{2}+", "a{2}?",   "a{1,2}+", "\\K",
        "\\R",    "\\G",           "\\xff",   "\\u12", "(?<n>a)", "(?#x)",   "(*FAIL)",
        "a(?i)b", "[\\W]",         "[a",      "(a",    "a)",      "*",       "\\",
        "\\p{",   "\\p{Nonsense}", "(?i",     "(?",    "\\0",     "[\\1]"}) {
    CAPTURE(pattern);
    const std::string error =
        test::error_of([&] { make_regex_matcher(pattern, "tokenizer.json: split 0"); });
    CHECK_THAT(error, Catch::StartsWith("tokenizer.json: split 0: "));
    CHECK_THAT(error, Catch::Contains("pattern '"));
  }
  CHECK_THROWS_AS(make_regex_matcher(std::string(20000, 'a'), "x"), DataError);
}

TEST_CASE("patterns: a catastrophic pattern is stopped with a sentence", "[tokenizer]") {
  const auto start = std::chrono::steady_clock::now();
  const std::string text = std::string(5000, 'a') + "b";
  for (const char* pattern : {"(a+)+$", "(?:a|aa)+$", "(?:a*)*[cd]", "(a|aa|b)*[cd]"}) {
    CAPTURE(pattern);
    const auto matcher = make_regex_matcher(pattern, "file: split 1");
    const std::string error = test::error_of([&] { matches(*matcher, text); });
    CHECK_THAT(error, Catch::Contains("gave up at byte 0 of a text of 5001 bytes"));
  }
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(20));
}

TEST_CASE("patterns: long runs take linear time", "[tokenizer]") {
  class Count : public PieceSink {
   public:
    void piece(std::string_view text) override { bytes += text.size(), ++pieces; }
    size_t bytes = 0, pieces = 0;
  };
  constexpr size_t kBytes = 4 << 20;
  std::vector<std::string> texts;
  for (const char* unit :
       {" ", "\n", "a", "1", "!", "' ", "\u3042", " \t", "\u0301", "\x01", "'"}) {
    std::string text;
    while (text.size() < kBytes) text += unit;
    texts.push_back(text);
    texts.push_back(text + "x");
  }
  const auto start = std::chrono::steady_clock::now();
  for (const char* name : {"gpt2", "llama3", "qwen2", "deepseek_v3"}) {
    const Pretokenizer pretokenizer(pretokenizer_preset(name), name);
    auto scratch = pretokenizer.make_scratch();
    for (const std::string& text : texts) {
      Count count;
      pretokenizer.split(text, scratch, count);
      CHECK(count.bytes == text.size());
    }
  }
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(30));
  CHECK_THROWS_AS(pretokenizer_preset("gpt5"), UsageError);
}

}  // namespace dstrain
