#include "core/data/unicode.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/data/unicode_tables.h"

namespace dstrain {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Looks at the sequence that starts at p. Valid: its length. Invalid: minus the length of its
// maximal prefix that could begin a character (at least 1), which one U+FFFD replaces.
int check_sequence(const unsigned char* p, const unsigned char* end) {
  const unsigned char lead = *p;
  if (lead < 0x80) return 1;
  // Range of the second byte: narrower than 80..BF where it excludes overlong forms, surrogates
  // and code points above U+10FFFF.
  unsigned char low = 0x80, high = 0xBF;
  int length = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return -1;
  }
  for (int i = 1; i < length; ++i) {
    if (p + i == end || p[i] < low || p[i] > high) return -i;
    low = 0x80;
    high = 0xBF;
  }
  return length;
}

std::vector<uint8_t> build_class_table() {
  std::vector<uint8_t> table(kCodePointCount);
  for (size_t i = 0; i < kClassRangeCount; ++i) {
    const char32_t stop = i + 1 < kClassRangeCount ? kClassRanges[i + 1].first : kCodePointCount;
    std::fill(table.begin() + kClassRanges[i].first, table.begin() + stop, kClassRanges[i].classes);
  }
  return table;
}

}  // namespace

const uint8_t* char_class_table() {
  static const std::vector<uint8_t> table = build_class_table();
  return table.data();
}

void append_utf8(char32_t c, std::string& out) {
  const auto put = [&out](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6);
    put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12);
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18);
    put(0x80 | (c >> 12 & 0x3F));
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  }
}

std::string printable(std::string_view text, size_t max_bytes) {
  const bool too_long = text.size() > max_bytes;
  if (too_long) {
    // Cut at a character's border.
    while (max_bytes > 0 && (static_cast<unsigned char>(text[max_bytes]) & 0xC0) == 0x80)
      --max_bytes;
    text = text.substr(0, max_bytes);
  }
  std::string buffer, out;
  int64_t replaced = 0;
  for (const char c : replace_invalid_utf8(text, buffer, replaced)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7F) {
      out.push_back(c);
    } else {
      constexpr char kHex[] = "0123456789ABCDEF";
      out.append("\\x").append({kHex[byte >> 4], kHex[byte & 15]});
    }
  }
  return too_long ? out + "..." : out;
}

size_t valid_utf8_prefix(std::string_view text) {
  const auto* begin = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = begin + text.size();
  const auto* p = begin;
  while (p < end) {
    // Eight ASCII bytes at a time.
    while (end - p >= 8) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      if ((word & 0x8080808080808080) != 0) break;
      p += 8;
    }
    if (p == end) break;
    const int length = check_sequence(p, end);
    if (length < 0) break;
    p += length;
  }
  return static_cast<size_t>(p - begin);
}

std::string_view replace_invalid_utf8(std::string_view text, std::string& buffer, int64_t& count) {
  size_t valid = valid_utf8_prefix(text);
  if (valid == text.size()) return text;
  buffer.clear();
  buffer.reserve(text.size() + 64);
  std::string_view rest = text;
  while (true) {
    buffer.append(rest.substr(0, valid));
    rest.remove_prefix(valid);
    if (rest.empty()) break;
    const auto* p = reinterpret_cast<const unsigned char*>(rest.data());
    const int length = check_sequence(p, p + rest.size());
    buffer.append(kReplacement);
    ++count;
    rest.remove_prefix(static_cast<size_t>(-length));
    valid = valid_utf8_prefix(rest);
  }
  return buffer;
}

}  // namespace dstrain
