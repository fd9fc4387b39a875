#include "core/config/scalar.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "core/config/problems.h"

namespace dstrain {
namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

size_t count_digits(std::string_view text) {
  size_t n = 0;
  while (n < text.size() && is_digit(text[n])) ++n;
  return n;
}

std::string_view without_sign(std::string_view text) {
  return !text.empty() && (text[0] == '-' || text[0] == '+') ? text.substr(1) : text;
}

// Digits with an optional fraction and exponent; at least one digit before the exponent.
bool is_decimal_number(std::string_view text) {
  text = without_sign(text);
  size_t digits = count_digits(text);
  text.remove_prefix(digits);
  if (text.substr(0, 1) == ".") {
    const size_t fraction = count_digits(text.substr(1));
    digits += fraction;
    text.remove_prefix(1 + fraction);
  }
  if (digits == 0) return false;
  if (text.empty()) return true;
  if (text[0] != 'e' && text[0] != 'E') return false;
  text = without_sign(text.substr(1));
  return !text.empty() && count_digits(text) == text.size();
}

// "010" is ten here and eight elsewhere.
bool has_leading_zero(std::string_view text) {
  text = without_sign(text);
  return count_digits(text) > 1 && text[0] == '0';
}

std::string strip_zeros(std::string_view text) {
  std::string out(text.substr(0, text.size() - without_sign(text).size()));
  std::string_view digits = without_sign(text);
  while (digits.size() > 1 && digits[0] == '0' && is_digit(digits[1])) digits.remove_prefix(1);
  return out + std::string(digits);
}

// What a person may have meant by text that is no decimal number.
std::string number_hint(std::string_view text) {
  std::string compact;
  for (char c : text)
    if (c != '_' && c != ',') compact += c;
  if (compact.size() < text.size() && is_decimal_number(compact))
    return "write " + compact + ", without separators";
  if (text.substr(0, 2) == "0x" || text.substr(0, 2) == "0o") return "write the decimal number";
  if (!text.empty() && text.back() == '%') return "write the fraction, such as 0.05 for 5%";
  return {};
}

// from_chars takes no plus sign.
std::string_view without_plus(std::string_view text) {
  return text.substr(0, 1) == "+" ? text.substr(1) : text;
}

}  // namespace

Parsed<int64_t> parse_int(std::string_view text) {
  const auto refuse = [&](std::string hint) -> Parsed<int64_t> {
    return {std::nullopt, "expects a whole number, got " + quote(text), std::move(hint)};
  };
  const std::string_view digits = without_sign(text);
  if (digits.empty() || count_digits(digits) != digits.size()) {
    const Parsed<double> number = parse_double(text);
    if (!number.value) return refuse(number_hint(text));
    const bool is_whole =
        *number.value == std::floor(*number.value) && std::abs(*number.value) < 1e15;
    return refuse(is_whole ? fmt::format("write {:.0f}", *number.value) : "");
  }
  if (has_leading_zero(text))
    return refuse("a leading zero may mean octal; write " + strip_zeros(text));
  int64_t value = 0;
  const std::string_view plain = without_plus(text);
  const auto [end, error] = std::from_chars(plain.data(), plain.data() + plain.size(), value);
  if (error != std::errc{} || end != plain.data() + plain.size())
    return {std::nullopt, "is too large: " + quote(text) + " does not fit in 64 bits", ""};
  return {value, {}, {}};
}

Parsed<double> parse_double(std::string_view text) {
  if (!is_decimal_number(text))
    return {std::nullopt, "expects a number, got " + quote(text), number_hint(text)};
  if (has_leading_zero(text))
    return {std::nullopt, "expects a number, got " + quote(text),
            "a leading zero may mean octal; write " + strip_zeros(text)};
  double value = 0;
  const std::string_view plain = without_plus(text);
  const auto [end, error] = std::from_chars(plain.data(), plain.data() + plain.size(), value);
  if (error != std::errc{} || end != plain.data() + plain.size())
    return {std::nullopt, "is out of range: " + quote(text) + " does not fit in a double", ""};
  return {value, {}, {}};
}

Parsed<bool> parse_bool(std::string_view text) {
  if (text == "true") return {true, {}, {}};
  if (text == "false") return {false, {}, {}};
  std::string lower;
  for (char c : text) lower += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  std::string hint;
  if (lower == "true" || lower == "yes" || lower == "on" || lower == "y" || lower == "1")
    hint = "write true";
  else if (lower == "false" || lower == "no" || lower == "off" || lower == "n" || lower == "0")
    hint = "write false";
  return {std::nullopt, "expects true or false, got " + quote(text), hint};
}

std::string format_double(double value) {
  return fmt::format("{}", value);
}

}  // namespace dstrain
