// Strict text forms of numbers and truth values, as job files and the command line write them.
// Integers are decimal digits with an optional sign. Numbers may have a fraction and an exponent.
// There is no octal, hexadecimal, underscore, nan, infinity, or yes/no.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace dstrain {

template <class T>
struct Parsed {
  std::optional<T> value;
  std::string reason;  // without a value: "expects a whole number, got 'abc'"
  std::string hint;    // may be empty
};

Parsed<int64_t> parse_int(std::string_view text);
Parsed<double> parse_double(std::string_view text);
Parsed<bool> parse_bool(std::string_view text);

// The shortest text that parses back to the same value.
std::string format_double(double value);

}  // namespace dstrain
