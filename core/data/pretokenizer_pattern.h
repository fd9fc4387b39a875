// Pattern engines of the pre-tokenizer: scanners for known patterns, PCRE2 for all others.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace dstrain {

struct PatternMatch {
  const char* begin;
  const char* end;
};

// Working memory of one thread for one matcher.
class PatternScratch {
 public:
  virtual ~PatternScratch() = default;
};

// Finds a pattern in valid UTF-8. Immutable; safe from several threads with a scratch each.
class PatternMatcher {
 public:
  virtual ~PatternMatcher() = default;
  virtual std::unique_ptr<PatternScratch> make_scratch() const { return nullptr; }
  // First match that starts at or after `from`, a character border inside text.
  virtual bool find(std::string_view text, const char* from, PatternScratch* scratch,
                    PatternMatch& match) const = 0;
};

inline constexpr char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
inline constexpr char kLlama3Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr char kQwen2Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr char kDeepSeekDigitsPattern[] = R"(\p{N}{1,3})";
inline constexpr char kDeepSeekCjkPattern[] = "[一-龥\u3040-ゟ゠-ヿ]+";
inline constexpr char kDeepSeekTextPattern[] =
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"
    "\\s*[\r\n]+|\\s+(?!\\S)|\\s+";

// The hand-written scanner of a pattern above, or null for any other pattern.
std::unique_ptr<PatternMatcher> make_scanner(const std::string& pattern);

// Single numbers, or runs of them.
std::unique_ptr<PatternMatcher> make_digit_matcher(bool individual);

// Literal text.
std::unique_ptr<PatternMatcher> make_literal_matcher(const std::string& text);

// PCRE2 with the meaning that Oniguruma's Ruby syntax gives the pattern. Throws DataError that
// begins with `where` if the pattern is wrong or uses something that would not mean the same. A
// search that needs too many steps throws DataError as well.
std::unique_ptr<PatternMatcher> make_regex_matcher(const std::string& pattern,
                                                   const std::string& where);

}  // namespace dstrain
