// Takes one string out of a JSON object without building the rest of it.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/data/text_source.h"

namespace dstrain {
namespace {

using nlohmann::json;

// Receives the parts of a JSON text; keeps the string whose key is `field` in the outermost object.
class FieldFinder : public nlohmann::json_sax<json> {
 public:
  explicit FieldFinder(const std::string& field) : field_(field) {}

  std::string value;
  int count = 0;           // strings found under the key
  bool is_object = false;  // the text is an object
  std::string other_type;  // of a value under the key that is no string
  size_t error_at = 0;
  std::string error;

  bool null() override { return scalar("null"); }
  bool boolean(bool) override { return scalar("true or false"); }
  bool number_integer(number_integer_t) override { return scalar("a number"); }
  bool number_unsigned(number_unsigned_t) override { return scalar("a number"); }
  bool number_float(number_float_t, const string_t&) override { return scalar("a number"); }
  bool binary(binary_t&) override { return scalar("binary"); }
  bool string(string_t& text) override {
    if (wanted()) {
      value = std::move(text);
      ++count;
    }
    return true;
  }
  bool start_object(size_t) override {
    if (depth_ == 0) is_object = true;
    return open("an object");
  }
  bool start_array(size_t) override { return open("a list"); }
  bool end_object() override { return --depth_, true; }
  bool end_array() override { return --depth_, true; }
  bool key(string_t& name) override {
    if (depth_ == 1) at_key_ = name == field_;
    return true;
  }
  bool parse_error(size_t at, const std::string&, const json::exception& exception) override {
    error_at = at;
    error = exception.what();
    return false;
  }

 private:
  bool wanted() const { return depth_ == 1 && is_object && at_key_; }
  bool scalar(const char* type) {
    if (wanted()) other_type = type;
    return true;
  }
  bool open(const char* type) {
    scalar(type);
    ++depth_;
    return true;
  }

  const std::string& field_;
  int64_t depth_ = 0;
  bool at_key_ = false;
};

// The reason alone, without the library's tag and its own idea of line and column.
std::string reason(const std::string& text) {
  const size_t colon = text.find(": ");
  return colon == std::string::npos ? text : text.substr(colon + 2);
}

}  // namespace

std::string json_field(std::string_view line, const std::string& field, const std::string& file,
                       int64_t line_number) {
  FieldFinder finder(field);
  const std::string where = fmt::format("{}:{}", file, line_number);
  if (!json::sax_parse(line.begin(), line.end(), &finder))
    throw DataError(
        fmt::format("{}:{}: not valid JSON: {}; each line of a .jsonl file is one JSON "
                    "object",
                    where, finder.error_at, reason(finder.error)));
  if (!finder.is_object)
    throw DataError(where + ": expected a JSON object, such as {\"" + field + "\": \"...\"}");
  if (!finder.other_type.empty())
    throw DataError(fmt::format("{}: the field \"{}\" is {}, expected a string", where, field,
                                finder.other_type));
  if (finder.count == 0)
    throw DataError(
        fmt::format("{}: the object has no field \"{}\"; name the one that holds the "
                    "document with --field",
                    where, field));
  if (finder.count > 1)
    throw DataError(
        fmt::format("{}: the object has the field \"{}\" {} times", where, field, finder.count));
  return std::move(finder.value);
}

}  // namespace dstrain
