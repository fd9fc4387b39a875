// UTF-8 and character classes for the tokenizer.
// Text inside the tokenizer is always valid UTF-8: replace_invalid_utf8 runs first. Each maximal
// invalid subsequence becomes one U+FFFD, as the Unicode standard recommends (the rule of Python's
// errors="replace"). All functions are pure and thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace dstrain {

// Bits of char_classes(). General categories are those of Unicode 16.
inline constexpr uint8_t kLetter = 1;   // \p{L}
inline constexpr uint8_t kMark = 2;     // \p{M}
inline constexpr uint8_t kNumber = 4;   // \p{N}
inline constexpr uint8_t kPunct = 8;    // \p{P}
inline constexpr uint8_t kSymbol = 16;  // \p{S}
inline constexpr uint8_t kSpace = 32;   // White_Space, the \s of the patterns
inline constexpr uint8_t kWord = 64;    // \w: alphabetic, mark, decimal digit, connector, joiner
inline constexpr uint8_t kNfcActive = 128;  // NFC may change it or join it to what precedes it

// One byte of the bits above per code point below kCodePointCount.
inline constexpr char32_t kCodePointCount = 0x110000;
const uint8_t* char_class_table();
inline uint8_t char_classes(char32_t code_point) {
  return char_class_table()[code_point];
}

// The character at p of valid UTF-8, and its length in bytes.
struct Utf8Char {
  char32_t code_point;
  int length;
};
inline Utf8Char decode_utf8(const char* p) {
  const auto b = [p](int i) { return static_cast<char32_t>(static_cast<unsigned char>(p[i])); };
  if (b(0) < 0x80) return {b(0), 1};
  if (b(0) < 0xE0) return {(b(0) & 0x1F) << 6 | (b(1) & 0x3F), 2};
  if (b(0) < 0xF0) return {(b(0) & 0x0F) << 12 | (b(1) & 0x3F) << 6 | (b(2) & 0x3F), 3};
  return {(b(0) & 0x07) << 18 | (b(1) & 0x3F) << 12 | (b(2) & 0x3F) << 6 | (b(3) & 0x3F), 4};
}

// Start of the character that ends just before p, in valid UTF-8.
inline const char* previous_utf8(const char* p) {
  do --p;
  while ((static_cast<unsigned char>(*p) & 0xC0) == 0x80);
  return p;
}

void append_utf8(char32_t code_point, std::string& out);

// Text for an error message: control characters as \xHH, invalid UTF-8 as U+FFFD, and "..." in
// place of what exceeds max_bytes.
std::string printable(std::string_view text, size_t max_bytes = 100);

// Length of the longest valid prefix of text, in bytes.
size_t valid_utf8_prefix(std::string_view text);

// Returns text itself if it is valid. Otherwise fills buffer, returns a view of it, and adds the
// number of replacements to count.
std::string_view replace_invalid_utf8(std::string_view text, std::string& buffer, int64_t& count);

}  // namespace dstrain
