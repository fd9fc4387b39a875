// Hand-written equivalents of the known patterns. Each scanner tries its alternatives in the
// pattern's order at one position; the comments quote the alternative at hand. All run in time
// linear in the text. Tests compare them with PCRE2.
#include <cstring>
#include <utility>

#include "core/data/pretokenizer_pattern.h"
#include "core/data/unicode.h"

namespace dstrain {
namespace {

// Text from a position to the end, with character classes.
class Cursor {
 public:
  explicit Cursor(const char* end) : end_(end) {}

  const char* end() const { return end_; }
  bool at_end(const char* p) const { return p == end_; }

  uint8_t classes(const char* p) const { return table_[decode_utf8(p).code_point]; }
  const char* next(const char* p) const { return p + decode_utf8(p).length; }

  // True if a character of these classes starts at p.
  bool has(const char* p, uint8_t mask) const { return p < end_ && (classes(p) & mask) != 0; }
  // True if a character of none of these classes starts at p.
  bool lacks(const char* p, uint8_t mask) const { return p < end_ && (classes(p) & mask) == 0; }

  const char* skip(const char* p, uint8_t mask) const {
    while (has(p, mask)) p = next(p);
    return p;
  }
  const char* skip_other(const char* p, uint8_t mask) const {
    while (lacks(p, mask)) p = next(p);
    return p;
  }
  const char* skip_newlines(const char* p) const {
    while (p < end_ && is_newline(*p)) ++p;
    return p;
  }
  static bool is_newline(char c) { return c == '\r' || c == '\n'; }

 private:
  const char* end_;
  const uint8_t* table_ = char_class_table();
};

// \s+(?!\S)|\s+ at a whitespace character: the run, without its last character if text follows.
const char* match_spaces(const Cursor& text, const char* p) {
  const char* stop = text.skip(p, kSpace);
  if (text.at_end(stop)) return stop;
  const char* last = previous_utf8(stop);
  return last > p ? last : stop;
}

// \s*[\r\n]+|\s+(?!\S)|\s+ at a whitespace character: to the last newline of the run, if any.
const char* match_lines_or_spaces(const Cursor& text, const char* p) {
  const char* stop = text.skip(p, kSpace);
  for (const char* q = stop; q > p; --q)
    if (Cursor::is_newline(q[-1])) return q;
  return match_spaces(text, p);
}

// 's|'t|'re|'ve|'m|'ll|'d after the apostrophe: the suffix's length, or 0. Folding case also
// takes U+017F, the long s.
int contraction_length(const char* p, const char* end, bool fold_case) {
  if (p == end) return 0;
  const auto lower = [fold_case](char c) {
    return fold_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c;
  };
  const char a = lower(p[0]);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 1;
  if (end - p < 2) return 0;
  const char b = lower(p[1]);
  if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 2;
  if (fold_case && p[0] == '\xC5' && p[1] == '\xBF') return 2;
  return 0;
}

struct Gpt2Scan {
  const char* match(const Cursor& text, const char* p) const {
    if (*p == '\'') {
      const int length = contraction_length(p + 1, text.end(), /*fold_case=*/false);
      if (length > 0) return p + 1 + length;
    }
    const char* q = *p == ' ' ? p + 1 : p;
    if (text.has(q, kLetter)) return text.skip(q, kLetter);  // " ?\p{L}+"
    if (text.has(q, kNumber)) return text.skip(q, kNumber);  // " ?\p{N}+"
    constexpr uint8_t kExcluded = kSpace | kLetter | kNumber;
    if (text.lacks(q, kExcluded)) return text.skip_other(q, kExcluded);  // " ?[^\s\p{L}\p{N}]+"
    return match_spaces(text, p);
  }
};

// Llama 3 takes up to three digits at a time, Qwen 2 one.
template <int kMaxDigits>
struct Llama3Scan {
  const char* match(const Cursor& text, const char* p) const {
    if (*p == '\'') {
      const int length = contraction_length(p + 1, text.end(), /*fold_case=*/true);
      if (length > 0) return p + 1 + length;
    }
    const uint8_t first = text.classes(p);
    // "[^\r\n\p{L}\p{N}]?\p{L}+"
    if ((first & kLetter) != 0) return text.skip(p, kLetter);
    if ((first & kNumber) == 0 && !Cursor::is_newline(*p) && text.has(text.next(p), kLetter))
      return text.skip(text.next(p), kLetter);
    if ((first & kNumber) != 0) {  // "\p{N}{1,3}" or "\p{N}"
      const char* stop = p;
      for (int i = 0; i < kMaxDigits && text.has(stop, kNumber); ++i) stop = text.next(stop);
      return stop;
    }
    // " ?[^\s\p{L}\p{N}]+[\r\n]*"
    const char* q = *p == ' ' ? p + 1 : p;
    constexpr uint8_t kExcluded = kSpace | kLetter | kNumber;
    if (text.lacks(q, kExcluded)) return text.skip_newlines(text.skip_other(q, kExcluded));
    return match_lines_or_spaces(text, p);
  }
};

struct DeepSeekDigitsScan {
  const char* match(const Cursor& text, const char* p) const {
    if (!text.has(p, kNumber)) return nullptr;
    const char* stop = p;
    for (int i = 0; i < 3 && text.has(stop, kNumber); ++i) stop = text.next(stop);
    return stop;
  }
};

struct DeepSeekCjkScan {
  static bool is_cjk(const char* p) {
    if (static_cast<unsigned char>(*p) < 0xE3) return false;  // U+3000 and up
    const char32_t c = decode_utf8(p).code_point;
    return (c >= 0x4E00 && c <= 0x9FA5) || (c >= 0x3040 && c <= 0x30FF);
  }
  const char* match(const Cursor& text, const char* p) const {
    const char* stop = p;
    while (!text.at_end(stop) && is_cjk(stop)) stop = text.next(stop);
    return stop > p ? stop : nullptr;
  }
};

struct DeepSeekTextScan {
  static bool is_ascii_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
  static bool is_ascii_punct(char c) {
    return c > ' ' && c < 0x7F && !is_ascii_letter(c) && !(c >= '0' && c <= '9');
  }
  const char* match(const Cursor& text, const char* p) const {
    // "[ASCII punctuation][A-Za-z]+"
    if (is_ascii_punct(*p)) {
      const char* stop = p + 1;
      while (!text.at_end(stop) && is_ascii_letter(*stop)) ++stop;
      if (stop > p + 1) return stop;
    }
    // "[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    const uint8_t first = text.classes(p);
    constexpr uint8_t kBody = kLetter | kMark;
    if ((first & kBody) != 0) return text.skip(p, kBody);
    if ((first & (kPunct | kSymbol)) == 0 && !Cursor::is_newline(*p) &&
        text.has(text.next(p), kBody))
      return text.skip(text.next(p), kBody);
    // " ?[\p{P}\p{S}]+[\r\n]*"
    const char* q = *p == ' ' ? p + 1 : p;
    constexpr uint8_t kMarks = kPunct | kSymbol;
    if (text.has(q, kMarks)) return text.skip_newlines(text.skip(q, kMarks));
    return (first & kSpace) != 0 ? match_lines_or_spaces(text, p) : nullptr;
  }
};

struct DigitScan {
  bool individual;
  const char* match(const Cursor& text, const char* p) const {
    if (!text.has(p, kNumber)) return nullptr;
    return individual ? text.next(p) : text.skip(p, kNumber);
  }
};

// A Scan's match(text, p) returns the end of the match that starts at p, or null.
template <class Scan>
class ScanMatcher : public PatternMatcher {
 public:
  explicit ScanMatcher(Scan scan = {}) : scan_(scan) {}

  bool find(std::string_view text, const char* from, PatternScratch*,
            PatternMatch& match) const override {
    const Cursor cursor(text.data() + text.size());
    for (const char* p = from; !cursor.at_end(p); p = cursor.next(p)) {
      if (const char* end = scan_.match(cursor, p)) {
        match = {p, end};
        return true;
      }
    }
    return false;
  }

 private:
  Scan scan_;
};

class LiteralMatcher : public PatternMatcher {
 public:
  explicit LiteralMatcher(std::string text) : text_(std::move(text)) {}

  bool find(std::string_view text, const char* from, PatternScratch*,
            PatternMatch& match) const override {
    const size_t at = text.find(text_, static_cast<size_t>(from - text.data()));
    if (at == std::string_view::npos) return false;
    match = {text.data() + at, text.data() + at + text_.size()};
    return true;
  }

 private:
  std::string text_;
};

// Patterns are written with line ends as characters or as escapes; both mean the same.
std::string with_escaped_newlines(std::string_view pattern) {
  std::string out;
  for (const char c : pattern) {
    if (c == '\r') {
      out += "\\r";
    } else if (c == '\n') {
      out += "\\n";
    } else {
      out.push_back(c);
    }
  }
  return out;
}

}  // namespace

std::unique_ptr<PatternMatcher> make_scanner(const std::string& pattern) {
  const std::string wanted = with_escaped_newlines(pattern);
  const auto is = [&wanted](std::string_view known) {
    return wanted == with_escaped_newlines(known);
  };
  if (is(kGpt2Pattern)) return std::make_unique<ScanMatcher<Gpt2Scan>>();
  if (is(kLlama3Pattern)) return std::make_unique<ScanMatcher<Llama3Scan<3>>>();
  if (is(kQwen2Pattern)) return std::make_unique<ScanMatcher<Llama3Scan<1>>>();
  if (is(kDeepSeekDigitsPattern)) return std::make_unique<ScanMatcher<DeepSeekDigitsScan>>();
  if (is(kDeepSeekCjkPattern)) return std::make_unique<ScanMatcher<DeepSeekCjkScan>>();
  if (is(kDeepSeekTextPattern)) return std::make_unique<ScanMatcher<DeepSeekTextScan>>();
  return nullptr;
}

std::unique_ptr<PatternMatcher> make_digit_matcher(bool individual) {
  return std::make_unique<ScanMatcher<DigitScan>>(DigitScan{individual});
}

std::unique_ptr<PatternMatcher> make_literal_matcher(const std::string& text) {
  return std::make_unique<LiteralMatcher>(text);
}

}  // namespace dstrain
