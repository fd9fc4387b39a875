#include "core/checkpoint/json_strict.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <unordered_set>
#include <vector>

#include "core/base/error.h"

namespace dstrain {
namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

// Length of the valid UTF-8 sequence at the start of `text` (RFC 3629), 0 if there is none.
size_t utf8_length(std::string_view text) {
  if (text.empty()) return 0;
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const auto continues = [&](size_t i, unsigned low = 0x80, unsigned high = 0xBF) {
    return i < text.size() && byte(i) >= low && byte(i) <= high;
  };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return continues(1) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF) {
    // The second byte excludes overlong forms (E0) and surrogates (ED).
    const unsigned low = first == 0xE0 ? 0xA0 : 0x80, high = first == 0xED ? 0x9F : 0xBF;
    return continues(1, low, high) && continues(2) ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const unsigned low = first == 0xF0 ? 0x90 : 0x80, high = first == 0xF4 ? 0x8F : 0xBF;
    return continues(1, low, high) && continues(2) && continues(3) ? 4 : 0;
  }
  return 0;
}

void append_code_point(std::string& out, unsigned code) {
  const auto put = [&](unsigned byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

}  // namespace

JsonReader::JsonReader(std::string_view text, std::string where)
    : text_(text), where_(std::move(where)) {}

void JsonReader::fail(const std::string& problem) const {
  throw DataError(fmt::format("{}: {} (byte {} of the JSON)", where_, problem, at_));
}

void JsonReader::skip_space() {
  while (at_ < text_.size() &&
         (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
    ++at_;
}

char JsonReader::peek() {
  skip_space();
  return at_ < text_.size() ? text_[at_] : '\0';
}

void JsonReader::expect(char wanted, const char* description) {
  if (peek() == wanted && at_ < text_.size()) {
    ++at_;
    return;
  }
  if (at_ >= text_.size()) fail(fmt::format("expected {}, but the text ends", description));
  fail(fmt::format("expected {}, found {}", description, printable_name(text_.substr(at_, 1))));
}

void JsonReader::object(const std::function<void(const std::string& key)>& on_key) {
  expect('{', "an object");
  if (peek() == '}') {
    ++at_;
    return;
  }
  std::unordered_set<std::string> keys;
  while (true) {
    if (peek() != '"') fail("expected a key in double quotes");
    const auto [key, is_new] = keys.insert(string());
    if (!is_new) fail(fmt::format("the key {} occurs twice", printable_name(*key)));
    expect(':', "':' after a key");
    on_key(*key);
    if (peek() == '}') break;
    expect(',', "',' or '}' after a value");
  }
  ++at_;
}

void JsonReader::fields(std::initializer_list<Field> fields) {
  std::vector<bool> seen(fields.size());
  object([&](const std::string& key) {
    const auto it = std::find_if(fields.begin(), fields.end(),
                                 [&](const Field& field) { return field.first == key; });
    if (it == fields.end()) fail(fmt::format("the key {} is unknown", printable_name(key)));
    it->second();
    seen[static_cast<size_t>(it - fields.begin())] = true;
  });
  for (size_t i = 0; i < fields.size(); ++i)
    if (!seen[i])
      fail(fmt::format("the key {} is missing", printable_name(fields.begin()[i].first)));
}

void JsonReader::array(const std::function<void()>& on_item) {
  expect('[', "an array");
  if (peek() == ']') {
    ++at_;
    return;
  }
  while (true) {
    on_item();
    if (peek() == ']') break;
    expect(',', "',' or ']' after an item");
  }
  ++at_;
}

std::string JsonReader::string() {
  expect('"', "a string");
  std::string out;
  while (true) {
    if (at_ >= text_.size()) fail("a string has no end");
    const char c = text_[at_];
    if (c == '"') break;
    if (c == '\\')
      append_escape(out);
    else
      append_utf8_sequence(out);
  }
  ++at_;
  return out;
}

void JsonReader::append_utf8_sequence(std::string& out) {
  if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("a control character inside a string");
  const size_t length = utf8_length(text_.substr(at_, 4));
  if (length == 0) fail("a string is not valid UTF-8");
  out.append(text_, at_, length);
  at_ += length;
}

void JsonReader::append_escape(std::string& out) {
  static constexpr std::string_view kLetters = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
  const char letter = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
  if (letter != 'u') {
    const size_t i = letter == '\0' ? kLetters.npos : kLetters.find(letter);
    if (i == kLetters.npos) fail("an unknown escape inside a string");
    out += kValues[i];
    at_ += 2;
    return;
  }
  unsigned code = hex4();
  if (code >= 0xDC00 && code <= 0xDFFF) fail("a lone low surrogate inside a string");
  if (code >= 0xD800 && code <= 0xDBFF) {
    if (text_.substr(at_, 2) != "\\u") fail("a lone high surrogate inside a string");
    const unsigned low = hex4();
    if (low < 0xDC00 || low > 0xDFFF) fail("a lone high surrogate inside a string");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  append_code_point(out, code);
}

// Reads "\uXXXX".
unsigned JsonReader::hex4() {
  const std::string_view digits = text_.substr(std::min(at_ + 2, text_.size()), 4);
  unsigned code = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
  if (digits.size() != 4 || error != std::errc() || end != digits.data() + 4 || digits[0] == '-')
    fail("\\u needs four hexadecimal digits");
  at_ += 6;
  return code;
}

// -?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?
std::string_view JsonReader::number_text() {
  const char first = peek();
  if (first != '-' && !is_digit(first)) fail("expected a number");
  const size_t begin = at_;
  const auto digit_here = [&] { return at_ < text_.size() && is_digit(text_[at_]); };
  const auto digits = [&] {
    if (!digit_here()) fail("a number is malformed");
    while (digit_here()) ++at_;
  };
  const auto here_is = [&](std::string_view set) {
    return at_ < text_.size() && set.find(text_[at_]) != set.npos;
  };
  if (here_is("-")) ++at_;
  if (here_is("0"))
    ++at_;
  else
    digits();
  if (here_is(".")) {
    ++at_;
    digits();
  }
  if (here_is("eE")) {
    ++at_;
    if (here_is("+-")) ++at_;
    digits();
  }
  return text_.substr(begin, at_ - begin);
}

int64_t JsonReader::integer() {
  const std::string_view digits = number_text();
  int64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error == std::errc::result_out_of_range)
    fail(fmt::format("{} does not fit into 64 bits", printable_name(digits)));
  if (error != std::errc() || end != digits.data() + digits.size())
    fail(fmt::format("expected an integer, found {}", printable_name(digits)));
  return value;
}

int64_t JsonReader::unsigned_integer() {
  const int64_t value = integer();
  if (value < 0) fail(fmt::format("expected an integer of at least 0, found {}", value));
  return value;
}

void JsonReader::skip_value() {
  skip_nested(0);
}

void JsonReader::skip_nested(int depth) {
  if (depth > kMaxSkipDepth)
    fail(fmt::format("values are nested more than {} deep", kMaxSkipDepth));
  const char first = peek();
  if (first == '{') return object([&](const std::string&) { skip_nested(depth + 1); });
  if (first == '[') return array([&] { skip_nested(depth + 1); });
  if (first == '"') return void(string());
  for (const std::string_view word : {"true", "false", "null"}) {
    if (text_.substr(at_, word.size()) != word) continue;
    at_ += word.size();
    return;
  }
  number_text();
}

void JsonReader::end() {
  skip_space();
  if (at_ != text_.size()) fail("text after the end of the JSON value");
}

std::string json_quote(std::string_view text) {
  std::string out = "\"";
  while (!text.empty()) {
    const size_t length = utf8_length(text);
    if (length == 0)
      throw DataError("cannot write " + printable_name(text) + " as JSON: it is not valid UTF-8");
    const char c = text[0];
    if (c == '"' || c == '\\')
      out.append({'\\', c});
    else if (c == '\n')
      out += "\\n";
    else if (static_cast<unsigned char>(c) < 0x20)
      out += fmt::format("\\u{:04x}", c);
    else
      out.append(text.substr(0, length));
    text.remove_prefix(length);
  }
  return out += '"';
}

std::string printable_name(std::string_view name) {
  constexpr size_t kShown = 120;
  std::string out = "'";
  const std::string_view full = name;
  while (!name.empty() && out.size() < kShown) {
    const size_t length = utf8_length(name);
    const auto first = static_cast<unsigned char>(name[0]);
    if (length == 0 || first < 0x20 || first == 0x7F) {
      out += fmt::format("\\x{:02x}", first);
      name.remove_prefix(1);
    } else {
      out.append(name.substr(0, length));
      name.remove_prefix(length);
    }
  }
  out += name.empty() ? "'" : fmt::format("...' ({} bytes)", full.size());
  return out;
}

}  // namespace dstrain
