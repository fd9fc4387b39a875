// Regular expressions by PCRE2. tokenizer.json means Oniguruma's Ruby syntax with Unicode classes,
// so the pattern is translated first; what has no equal is refused rather than guessed.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>

#include "core/base/error.h"
#include "core/data/pretokenizer_pattern.h"
#include "core/data/unicode.h"

namespace dstrain {
namespace {

// Steps that one search may take; a catastrophic pattern reaches it in a fraction of a second.
constexpr uint32_t kMatchLimit = 10'000'000;
constexpr size_t kMaxPatternBytes = 16384;
constexpr size_t kJitStackBytes = size_t{4} << 20;
constexpr uint32_t kInterpreterHeapKib = 64 * 1024;

// The inside of a character class for \w. Oniguruma counts the Latin-1 numerals in, too.
constexpr char kWordClass[] = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\xb2\xb3\xb9\xbc-\xbe)";

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where)
      : pattern_(pattern), where_(where) {}

  std::string translate() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        escape(/*in_class=*/false);
      } else if (c == '[') {
        out_ += '[';
        ++at_;
        if (peek() == '^') copy(1);
        char_class();
        out_ += ']';
      } else if (c == '(') {
        group();
      } else if (c == '{') {
        braces();
      } else {
        copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  char peek(size_t ahead = 0) const {
    return at_ + ahead < pattern_.size() ? pattern_[at_ + ahead] : '\0';
  }
  void copy(size_t count) {
    out_ += pattern_.substr(at_, count);
    at_ = std::min(at_ + count, pattern_.size());
  }
  void replace(size_t count, std::string_view text) {
    out_ += text;
    at_ += count;
  }
  [[noreturn]] void refuse(const std::string& what) const {
    throw DataError(fmt::format("{}: {} at offset {} of the pattern '{}' is not supported", where_,
                                what, at_, printable(pattern_)));
  }

  void escape(bool in_class) {
    const char c = peek(1);
    const auto letter = static_cast<unsigned char>(c | 0x20);
    const bool is_letter = letter >= 'a' && letter <= 'z';
    if (at_ + 1 >= pattern_.size()) refuse("a backslash");
    if (!is_letter && !(c >= '0' && c <= '9')) return copy(2);  // stands for itself
    if (!is_letter && (in_class || c == '0')) refuse("a numeric escape");
    const std::string word = kWordClass;
    switch (c) {
      case 's':
        return replace(2, R"(\p{White_Space})");
      case 'S':
        return replace(2, R"(\P{White_Space})");
      case 'w':
        return replace(2, in_class ? word : "[" + word + "]");
      case 'h':
        return replace(2, in_class ? "0-9a-fA-F" : "[0-9a-fA-F]");
      case 'v':
        return replace(2, R"(\x0b)");
      case 'u':
        return code_point(2, 4);
      case 'x':
        return peek(2) == '{' ? copy_braced() : code_point(2, 2);
      case 'b':
        return replace(2, in_class ? R"(\x08)" : word_border("(?<={0})(?!{0})|(?<!{0})(?={0})"));
      case 'p':
      case 'P':
        return peek(2) == '{' ? copy_braced() : copy(2);
      case 'd':
      case 'D':
      case 'n':
      case 't':
      case 'r':
      case 'f':
      case 'a':
      case 'e':
      case '1':
      case '2':
      case '3':
      case '4':
      case '5':
      case '6':
      case '7':
      case '8':
      case '9':
        return copy(2);
      default:
        break;
    }
    if (!in_class) {
      if (c == 'W') return replace(2, "[^" + word + "]");
      if (c == 'H') return replace(2, "[^0-9a-fA-F]");
      if (c == 'B') return replace(2, word_border("(?<={0})(?={0})|(?<!{0})(?!{0})"));
      if (c == 'A' || c == 'z' || c == 'Z') return copy(2);
    }
    refuse(fmt::format("the escape \\{}{}", c, in_class ? " in a character class" : ""));
  }

  // \x{...} and \p{...} as they are.
  void copy_braced() {
    const size_t stop = pattern_.find('}', at_);
    if (stop == std::string_view::npos) refuse("an escape without its closing brace");
    copy(stop + 1 - at_);
  }

  // {0} stands for a word character.
  static std::string word_border(std::string form) {
    const std::string word = "[" + std::string(kWordClass) + "]";
    for (size_t at = form.find("{0}"); at != std::string::npos; at = form.find("{0}", at))
      form.replace(at, 3, word);
    return "(?:" + form + ")";
  }

  // \uHHHH and \xHH.
  void code_point(size_t skip, size_t digits) {
    const std::string_view hex = pattern_.substr(at_ + skip).substr(0, digits);
    const bool valid = hex.size() == digits &&
                       hex.find_first_not_of("0123456789abcdefABCDEF") == std::string_view::npos;
    if (!valid) refuse("an incomplete hexadecimal escape");
    if (digits == 2 && hex[0] >= '8') refuse("an escape for a single byte above \\x7F");
    replace(skip + digits, fmt::format("\\x{{{}}}", hex));
  }

  // After '[' or '[^', up to and including ']'. A nested class is a union in Ruby's syntax, so its
  // members join the outer class.
  void char_class() {
    bool first = true;
    while (true) {
      if (at_ >= pattern_.size()) refuse("a character class without its end");
      const char c = pattern_[at_];
      if (c == ']' && !first) {
        ++at_;
        return;
      }
      if (c == '\\') {
        escape(/*in_class=*/true);
      } else if (c == '[') {
        if (peek(1) == ':') refuse("a POSIX bracket");
        if (peek(1) == '^') refuse("a negated class inside a class");
        ++at_;
        char_class();
      } else if (c == '&' && peek(1) == '&') {
        refuse("an intersection of classes");
      } else if (c == ']' || (c == '-' && (first || peek(1) == ']' || peek(1) == '['))) {
        out_ += '\\';
        copy(1);
      } else {
        copy(1);
      }
      first = false;
    }
  }

  void group() {
    if (peek(1) == '*') refuse("a callout");
    if (peek(1) != '?') return copy(1);
    const char kind = peek(2);
    if (kind == ':' || kind == '=' || kind == '!' || kind == '>') return copy(3);
    if (kind == '<' && (peek(3) == '=' || peek(3) == '!')) return copy(4);
    flags();
  }

  // (?i:...) and a leading (?i). Ruby's m lets the dot match newlines, which is s in PCRE2.
  void flags() {
    const size_t stop = pattern_.find_first_not_of("im-", at_ + 2);
    const char closer = stop == std::string_view::npos ? '\0' : pattern_[stop];
    if (closer != ':' && !(closer == ')' && at_ == 0)) refuse("this kind of group");
    for (size_t i = at_; i <= stop; ++i) out_ += pattern_[i] == 'm' ? 's' : pattern_[i];
    at_ = stop + 1;
  }

  // {n}, {n,}, {n,m} and Ruby's {,m}; any other brace is a character.
  void braces() {
    const size_t stop = pattern_.find_first_not_of("0123456789,", at_ + 1);
    const bool closed = stop != std::string_view::npos && pattern_[stop] == '}';
    const std::string_view body =
        closed ? pattern_.substr(at_ + 1, stop - at_ - 1) : std::string_view();
    const auto commas = std::count(body.begin(), body.end(), ',');
    if (body.find_first_not_of(',') == std::string_view::npos || commas > 1)
      return replace(1, "\\{");
    const char next = stop + 1 < pattern_.size() ? pattern_[stop + 1] : '\0';
    // A second quantifier repeats the first one in Ruby and changes its greed in PCRE2.
    if (next == '+' || (next == '?' && commas == 0))
      refuse(fmt::format("'{}' after a counted repetition", next));
    out_ += body.front() == ',' ? "{0" : "{";
    out_ += body;
    out_ += '}';
    at_ = stop + 1;
  }

  std::string_view pattern_;
  const std::string& where_;
  size_t at_ = 0;
  std::string out_;
};

template <auto kFree>
struct Free {
  template <class T>
  void operator()(T* p) const {
    kFree(p);
  }
};
using Code = std::unique_ptr<pcre2_code, Free<pcre2_code_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, Free<pcre2_compile_context_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Free<pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>>;
using JitStack = std::unique_ptr<pcre2_jit_stack, Free<pcre2_jit_stack_free>>;

std::string error_text(int code) {
  unsigned char text[256];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

PCRE2_SPTR bytes(const char* text) {
  return reinterpret_cast<PCRE2_SPTR>(text);
}

struct RegexScratch : PatternScratch {
  MatchData data;
  MatchContext context;
  JitStack stack;
};

class RegexMatcher : public PatternMatcher {
 public:
  RegexMatcher(const std::string& pattern, const std::string& where)
      : pattern_(pattern), where_(where) {
    if (pattern.size() > kMaxPatternBytes)
      throw DataError(fmt::format("{}: the pattern has {} bytes; at most {} are allowed", where,
                                  pattern.size(), kMaxPatternBytes));
    const std::string translated = Translator(pattern_, where_).translate();
    const CompileContext context(pcre2_compile_context_create(nullptr));
    DSTRAIN_CHECK(context != nullptr, "PCRE2 found no memory");
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    constexpr uint32_t kOptions =
        PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK | PCRE2_NEVER_BACKSLASH_C;
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(bytes(translated.data()), translated.size(), kOptions, &error,
                              &offset, context.get()));
    if (code_ == nullptr)
      throw DataError(fmt::format("{}: the pattern '{}' is not usable: {} (offset {} of '{}')",
                                  where_, printable(pattern_), error_text(error), offset,
                                  printable(translated)));
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // without it PCRE2 interprets
  }

  std::unique_ptr<PatternScratch> make_scratch() const override {
    auto scratch = std::make_unique<RegexScratch>();
    scratch->data.reset(pcre2_match_data_create(1, nullptr));
    scratch->context.reset(pcre2_match_context_create(nullptr));
    scratch->stack.reset(pcre2_jit_stack_create(32 * 1024, kJitStackBytes, nullptr));
    DSTRAIN_CHECK(scratch->data && scratch->context, "PCRE2 found no memory");
    pcre2_set_match_limit(scratch->context.get(), kMatchLimit);
    pcre2_set_heap_limit(scratch->context.get(), kInterpreterHeapKib);
    if (scratch->stack)
      pcre2_jit_stack_assign(scratch->context.get(), nullptr, scratch->stack.get());
    return scratch;
  }

  bool find(std::string_view text, const char* from, PatternScratch* scratch,
            PatternMatch& match) const override {
    auto& mine = static_cast<RegexScratch&>(*scratch);
    const auto start = static_cast<PCRE2_SIZE>(from - text.data());
    const int rc = pcre2_match(code_.get(), bytes(text.data()), text.size(), start,
                               PCRE2_NO_UTF_CHECK, mine.data.get(), mine.context.get());
    if (rc == PCRE2_ERROR_NOMATCH) return false;
    if (rc < 0)
      throw DataError(fmt::format(
          "{}: the pattern '{}' gave up at byte {} of a text of {} bytes ({}); it backtracks too "
          "much, use a simpler one",
          where_, printable(pattern_), start, text.size(), error_text(rc)));
    const PCRE2_SIZE* borders = pcre2_get_ovector_pointer(mine.data.get());
    match = {text.data() + borders[0], text.data() + borders[1]};
    return true;
  }

 private:
  std::string pattern_;
  std::string where_;
  Code code_;
};

}  // namespace

std::unique_ptr<PatternMatcher> make_regex_matcher(const std::string& pattern,
                                                   const std::string& where) {
  return std::make_unique<RegexMatcher>(pattern, where);
}

}  // namespace dstrain
