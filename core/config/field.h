// What a field of the job file may hold: its range rule, and the names of its enum values.
//
// A struct lists its fields once:
//
//   static void fields(auto& field, auto& c) {
//     field("lr", c.lr, at_least(0.0), "peak learning rate");
//   }
//
// `field` is any object callable as field(const char* name, T& member, const Range& range,
// const char* meaning), so one list serves loading, describing and every other purpose.
// T is bool, int64_t, double, std::string, a named enum, std::optional<bool>,
// std::pair<double, double>, StepCount, AutoInt, std::vector<std::string>, a struct with fields(),
// or a std::vector of such structs.
#pragma once

#include <array>
#include <limits>
#include <optional>
#include <string_view>
#include <type_traits>

namespace dstrain {

// Bounds of a number. Bounds are held as doubles: those of integers stay far below 2^53.
struct Range {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool low_is_excluded = false;
  bool is_required = false;   // a training run cannot do without a value
  bool accepts_null = false;  // null stands for 0, as in a Hugging Face config.json

  bool contains(double value) const {
    return (low_is_excluded ? value > low : value >= low) && value <= high;
  }
  constexpr Range or_null() const {
    Range range = *this;
    range.accepts_null = true;
    return range;
  }
};

constexpr Range any() {
  return {};
}
constexpr Range required() {
  Range range;
  range.is_required = true;
  return range;
}
constexpr Range in_range(double low, double high) {
  Range range;
  range.low = low;
  range.high = high;
  return range;
}
constexpr Range at_least(double low) {
  return in_range(low, std::numeric_limits<double>::infinity());
}
constexpr Range above(double low) {
  Range range = at_least(low);
  range.low_is_excluded = true;
  return range;
}

// The names of an enum's values, in the order in which they are shown.
template <class E>
struct EnumName {
  E value;
  std::string_view name;
};

template <class E>
inline constexpr std::array<EnumName<E>, 0> kEnumNames{};

#define DSTRAIN_ENUM_NAMES(E, ...) \
  template <>                      \
  inline constexpr auto kEnumNames<E> = std::to_array<EnumName<E>>({__VA_ARGS__})

template <class E>
concept NamedEnum = std::is_enum_v<E> &&(kEnumNames<E>.size() > 0);

template <NamedEnum E>
constexpr std::string_view enum_name(E value) {
  for (const auto& entry : kEnumNames<E>)
    if (entry.value == value) return entry.name;
  return {};
}

template <NamedEnum E>
constexpr std::optional<E> enum_from_name(std::string_view name) {
  for (const auto& entry : kEnumNames<E>)
    if (entry.name == name) return entry.value;
  return std::nullopt;
}

// A struct that lists its fields.
struct IgnoreField {
  void operator()(const char*, auto&, const Range&, const char*) {}
};
template <class T>
concept FieldStruct = requires(T& value, IgnoreField field) {
  T::fields(field, value);
};

}  // namespace dstrain
