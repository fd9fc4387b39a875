// A strict pull parser for JSON from files that may be damaged or hostile. The caller asks for the
// value it expects; anything else is a DataError with the byte offset. Duplicate keys, invalid
// UTF-8, NUL bytes, a byte-order mark and text after the value are refused. Nothing is built in
// memory but the keys of the objects that are open.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

namespace dstrain {

class JsonReader {
 public:
  // `where` starts every error text, for example the path; `text` must outlive the reader.
  JsonReader(std::string_view text, std::string where);

  // Calls on_key once per key; on_key must read exactly one value.
  void object(const std::function<void(const std::string& key)>& on_key);
  // An object that has exactly these keys, in any order; each function reads its key's value.
  using Field = std::pair<std::string_view, std::function<void()>>;
  void fields(std::initializer_list<Field> fields);
  // Calls on_item once per item; on_item must read exactly one value.
  void array(const std::function<void()>& on_item);
  std::string string();
  int64_t integer();           // no fraction, no exponent
  int64_t unsigned_integer();  // 0 <= value <= 2^63 - 1
  void skip_value();           // any value, checked as strictly; at most kMaxSkipDepth deep
  void end();                  // nothing but white space may follow

  static constexpr int kMaxSkipDepth = 64;

  [[noreturn]] void fail(const std::string& problem) const;

 private:
  void skip_space();
  char peek();  // next character that is no space; 0 at the end
  void expect(char wanted, const char* description);
  std::string_view number_text();
  void append_escape(std::string& out);
  void append_utf8_sequence(std::string& out);
  unsigned hex4();
  void skip_nested(int depth);

  std::string_view text_;
  std::string where_;
  size_t at_ = 0;
};

// The text in double quotes with what JSON needs escaped. DataError if it is not UTF-8.
std::string json_quote(std::string_view text);
// A name for error texts: in single quotes, shortened, control characters as \xNN.
std::string printable_name(std::string_view name);

}  // namespace dstrain
