#include "core/base/format_units.h"

#include <fmt/format.h>

#include <cmath>
#include <iterator>

namespace dstrain {
namespace {

// Three significant digits of a value below about 1000; whole numbers stay whole.
std::string three_digits(double value, bool whole) {
  if (whole || value >= 99.95) return fmt::format("{:.0f}", value);
  return value >= 9.995 ? fmt::format("{:.1f}", value) : fmt::format("{:.2f}", value);
}

struct Scaled {
  double value;
  int power;  // how many times `base` was divided out
};

// Divides until the rounded value has at most three digits before the point.
Scaled scale(double value, double base, int max_power) {
  const double limit = base == 1000.0 ? 999.5 : 1023.5;
  int power = 0;
  while (power < max_power && value >= limit) {
    value /= base;
    ++power;
  }
  return {value, power};
}

}  // namespace

std::string format_bytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 0) return "n/a";
  const Scaled scaled =
      scale(static_cast<double>(bytes), 1024.0, static_cast<int>(std::size(kUnits)) - 1);
  return fmt::format("{} {}", three_digits(scaled.value, scaled.power == 0), kUnits[scaled.power]);
}

std::string format_count(double count) {
  static constexpr const char* kUnits[] = {"", "k", "M", "B", "T"};
  if (!std::isfinite(count)) return "n/a";
  if (count < 0) return fmt::format("-{}", format_count(-count));
  const Scaled scaled = scale(count, 1000.0, static_cast<int>(std::size(kUnits)) - 1);
  const bool whole = scaled.power == 0 && scaled.value == std::floor(scaled.value);
  return three_digits(scaled.value, whole) + kUnits[scaled.power];
}

std::string format_grouped(int64_t count) {
  std::string digits = fmt::format("{}", count);
  const size_t first = count < 0 ? 1 : 0;
  for (size_t at = digits.size(); at > first + 3;) {
    at -= 3;
    digits.insert(at, 1, ',');
  }
  return digits;
}

std::string format_duration(double seconds) {
  constexpr double kLongest = 1e12;  // beyond that nobody waits, and int64_t seconds stay exact
  if (!std::isfinite(seconds) || seconds < 0 || seconds > kLongest) return "n/a";
  if (seconds < 0.9995) return fmt::format("{:.0f}ms", seconds * 1e3);
  if (seconds < 59.95) return fmt::format("{:.1f}s", seconds);
  const int64_t s = std::llround(seconds);
  if (s < 3600) return fmt::format("{}m{:02}s", s / 60, s % 60);
  if (s < 86400) return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
  return fmt::format("{}d{:02}h", s / 86400, s / 3600 % 24);
}

std::string format_flops(double operations) {
  static constexpr const char* kUnits[] = {"", "k", "M", "G", "T", "P", "E", "Z", "Y"};
  if (!std::isfinite(operations) || operations < 0) return "n/a";
  const Scaled scaled = scale(operations, 1000.0, static_cast<int>(std::size(kUnits)) - 1);
  return fmt::format("{} {}FLOP", three_digits(scaled.value, scaled.power == 0),
                     kUnits[scaled.power]);
}

std::string format_plural(int64_t count, std::string_view noun) {
  return fmt::format("{} {}{}", format_grouped(count), noun, count == 1 ? "" : "s");
}

std::string format_fixed(double value, int digits) {
  return std::isnan(value) ? "nan" : fmt::format("{:.{}f}", value, digits);
}

}  // namespace dstrain
