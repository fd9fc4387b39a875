#include "core/config/yaml_tree.h"

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <set>
#include <sstream>
#include <utility>

namespace dstrain {
namespace {

// Ends the scan at the first thing that makes the text unreadable.
struct Refused {
  Location location;
  std::string message;
  std::string hint;
};

Location location_of_offset(int source, std::string_view text, size_t offset) {
  Location location{source, 1, 1, 1};
  for (size_t i = 0; i < offset; ++i) {
    if (text[i] == '\n') {
      ++location.line;
      location.column = 1;
    } else {
      ++location.column;
    }
  }
  return location;
}

void check_encoding(int source, std::string_view text) {
  const auto starts_with = [&](std::string_view prefix) {
    return text.substr(0, prefix.size()) == prefix;
  };
  const Location start{source, 1, 1, 1};
  if (starts_with("\xEF\xBB\xBF"))
    throw Refused{start, "the file starts with a byte order mark", "save it as UTF-8 without BOM"};
  const bool has_utf16_mark = starts_with("\xFF\xFE") || starts_with("\xFE\xFF");
  const bool alternates_with_nul = text.size() >= 2 && (text[0] == '\0') != (text[1] == '\0');
  if (has_utf16_mark || alternates_with_nul)
    throw Refused{start, "the file is not UTF-8 but looks like UTF-16 or UTF-32",
                  "save it as UTF-8"};
  const size_t nul = text.find('\0');
  if (nul != std::string_view::npos)
    throw Refused{location_of_offset(source, text, nul), "the file contains a NUL byte",
                  "a job file is plain text"};
  if (const auto bad = find_invalid_utf8(text))
    throw Refused{location_of_offset(source, text, *bad),
                  "the file contains bytes that are not UTF-8", "save it as UTF-8"};
}

void check_characters(int source, std::string_view text) {
  bool in_indentation = true;
  size_t tab = std::string_view::npos;  // the first in this line's indentation
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\n') {
      in_indentation = true;
      tab = std::string_view::npos;
      continue;
    }
    const bool is_crlf = c == '\r' && i + 1 < text.size() && text[i + 1] == '\n';
    if ((static_cast<unsigned char>(c) < 0x20 && c != '\t' && !is_crlf) || c == 0x7F)
      throw Refused{location_of_offset(source, text, i),
                    fmt::format("the file contains the control character 0x{:02x}", c),
                    "remove it; lines end with LF or CR LF"};
    if (!in_indentation || c == ' ' || is_crlf) continue;
    if (c == '\t') {
      if (tab == std::string_view::npos) tab = i;
      continue;
    }
    if (tab != std::string_view::npos && c != '#')
      throw Refused{location_of_offset(source, text, tab), "a tab in the indentation",
                    "YAML is indented with spaces"};
    in_indentation = false;
  }
}

// The text from a mark of the parser on; the parser counts bytes, lines and columns from 0.
class MarkedText {
 public:
  explicit MarkedText(std::string_view text) : text_(text) {
    line_starts_.push_back(0);
    for (size_t i = 0; i < text.size(); ++i)
      if (text[i] == '\n') line_starts_.push_back(i + 1);
  }
  std::string_view from(const YAML::Mark& mark) const {
    return mark.is_null() ? std::string_view{} : at({0, mark.line + 1, mark.column + 1});
  }
  std::string_view at(const Location& location) const {
    const size_t line = static_cast<size_t>(location.line - 1);
    if (line >= line_starts_.size()) return {};
    const size_t offset = line_starts_[line] + static_cast<size_t>(location.column - 1);
    return text_.substr(std::min(text_.size(), offset));
  }

 private:
  std::string_view text_;
  std::vector<size_t> line_starts_;
};

// Bytes of the quoted scalar that `text` begins with, both quotes included; nothing if it never
// ends.
std::optional<size_t> quoted_length(std::string_view text) {
  const char quote_mark = text[0];
  for (size_t i = 1; i < text.size(); ++i) {
    if (text[i] == '\\' && quote_mark == '"') {
      ++i;
    } else if (text[i] == quote_mark) {
      const bool is_doubled = quote_mark == '\'' && i + 1 < text.size() && text[i + 1] == '\'';
      if (!is_doubled) return i + 1;
      ++i;
    }
  }
  return std::nullopt;
}

// The library's terse messages, said for a person: {message, hint}.
std::pair<std::string, std::string> explain_parse_error(const std::string& message,
                                                        std::string_view text) {
  if (text.substr(0, 1) == "*")
    return {"YAML aliases (*name) are not supported", "write the value out"};
  if (message == YAML::ErrorMsg::MAP_VALUE)
    return {"a ':' where no key can stand", "quote a value that contains ': '"};
  if (message == YAML::ErrorMsg::UNKNOWN_TOKEN && !text.empty())
    return {fmt::format("a plain value cannot begin with {}", quote(text.substr(0, 1))),
            "quote it"};
  if (message == YAML::ErrorMsg::EOF_IN_SCALAR)
    return {"the file ends inside a quoted text", "close the quote"};
  if (message == YAML::ErrorMsg::END_OF_SEQ_FLOW || message == YAML::ErrorMsg::END_OF_MAP_FLOW)
    return {"a '[' or '{' is not closed, or a ',' is missing", "see this line and those above"};
  return {"not valid YAML: " + message,
          "check indentation, colons, quotes and brackets here and in the line above"};
}

// Builds the tree from the parser's events. The stack holds what is open, outermost first; `root_`
// owns all of it, and a container is only appended to while it is innermost, so pointers stay
// valid.
class TreeBuilder : public YAML::EventHandler {
 public:
  TreeBuilder(int source, const MarkedText& text, Problems& problems)
      : source_(source), text_(text), problems_(problems) {}

  YamlNode take_root() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (documents_++ == 0) return;
    if (text_.from(mark).substr(0, 3) != "---")
      throw Refused{location(mark), "this line is indented less than the first one",
                    "give all top-level keys the same indentation"};
    throw Refused{location(mark), "a second YAML document starts here", "keep one in a job file"};
  }
  void OnDocumentEnd() override {}

  void OnAnchor(const YAML::Mark& mark, const std::string& name) override {
    refuse_anchor(mark, name.size());
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    throw Refused{location(mark), "YAML aliases (*name) are not supported", "write the value out"};
  }

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    check(mark, "", anchor);
    if (expects_key())
      throw Refused{location(mark), "a key is missing or null", "write 'key: value'"};
    YamlNode node;
    node.location = location(mark);
    refuse_key_without_colon();
    // For "key:" the parser marks the next token, which may be lines below.
    if (const YamlEntry* entry = open_entry(); entry && entry->location.line != node.location.line)
      node.location = entry->location;
    append(std::move(node));
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    check(mark, tag, anchor);
    const bool is_quoted = tag == "!";
    const Location place = location(mark, scalar_length(mark, value));
    if (expects_key()) return add_key(place, value);
    YamlNode node;
    node.kind = YamlNode::Kind::scalar;
    node.text = value;
    node.is_quoted = is_quoted;
    node.location = place;
    append(std::move(node));
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value style) override {
    open(mark, tag, anchor, YamlNode::Kind::list, style);
  }
  void OnSequenceEnd() override { close(); }

  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value style) override {
    open(mark, tag, anchor, YamlNode::Kind::map, style);
  }
  void OnMapEnd() override { close(); }

 private:
  struct Open {
    YamlNode* node = nullptr;
    std::set<std::string> keys;  // map: seen so far
    bool is_flow = false;        // in brackets
    bool awaits_value = false;   // map: the last entry has a key but no value yet
  };

  Location location(const YAML::Mark& mark, size_t length = 1) const {
    return {source_, mark.line + 1, mark.column + 1, static_cast<int>(length)};
  }

  [[noreturn]] void refuse_anchor(const YAML::Mark& mark, size_t length) const {
    throw Refused{location(mark, length + 1), "YAML anchors (&name) are not supported",
                  "write the value where it is needed"};
  }

  void check(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) const {
    if (anchor != 0) refuse_anchor(mark, 0);
    const bool is_tagged = text_.from(mark).substr(0, 1) == "!";
    if (is_tagged || (!tag.empty() && tag != "?" && tag != "!"))
      throw Refused{location(mark), fmt::format("YAML tags are not supported, got {}", quote(tag)),
                    "write the plain value"};
  }

  size_t scalar_length(const YAML::Mark& mark, const std::string& value) const {
    const std::string_view raw = text_.from(mark);
    if (raw.empty() || (raw[0] != '"' && raw[0] != '\'')) return value.size();
    if (const auto length = quoted_length(raw)) return *length;
    throw Refused{location(mark), "this quote is never closed",
                  fmt::format("end the text with {}", raw[0])};
  }

  // The entry whose value comes next; null if none does.
  const YamlEntry* open_entry() const {
    return !stack_.empty() && stack_.back().awaits_value ? &stack_.back().node->entries.back()
                                                         : nullptr;
  }

  // The parser takes a lone word among the entries of a map for a key whose value is null.
  void refuse_key_without_colon() const {
    const YamlEntry* entry = open_entry();
    if (!entry) return;
    std::string_view rest = text_.at(entry->location);
    rest.remove_prefix(std::min(rest.size(), static_cast<size_t>(entry->location.length)));
    rest.remove_prefix(std::min(rest.size(), rest.find_first_not_of(' ')));
    if (rest.substr(0, 1) == ":" || stack_.back().is_flow) return;
    const bool in_flow =
        std::any_of(stack_.begin(), stack_.end(), [](const Open& o) { return o.is_flow; });
    if (in_flow)
      throw Refused{entry->location, "a '[' or '{' is not closed, or a ',' is missing", ""};
    throw Refused{entry->location, fmt::format("no ':' after {}", quote(entry->key)),
                  "write 'key: value', or '- value' for a list"};
  }

  bool expects_key() const {
    return !stack_.empty() && stack_.back().node->kind == YamlNode::Kind::map &&
           !stack_.back().awaits_value;
  }

  void add_key(const Location& place, const std::string& key) {
    Open& top = stack_.back();
    if (!top.keys.insert(key).second) {
      problems_.add(place, fmt::format("key {} is given twice", quote(key)),
                    problems_.wants_detail() ? first_use(*top.node, key) : "");
    }
    top.node->entries.push_back({key, place, {}});
    top.awaits_value = true;
  }

  static std::string first_use(const YamlNode& map, const std::string& key) {
    for (const YamlEntry& entry : map.entries)
      if (entry.key == key)
        return fmt::format("the first is in line {}; keep one", entry.location.line);
    return {};
  }

  YamlNode* append(YamlNode node) {
    if (stack_.empty()) {
      root_ = std::move(node);
      return &root_;
    }
    Open& top = stack_.back();
    if (top.node->kind == YamlNode::Kind::list)
      return &top.node->items.emplace_back(std::move(node));
    top.awaits_value = false;
    return &(top.node->entries.back().value = std::move(node));
  }

  void open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
            YamlNode::Kind kind, YAML::EmitterStyle::value style) {
    check(mark, tag, anchor);
    if (expects_key())
      throw Refused{location(mark), "a key must be plain text, got a list or a map",
                    "quote the key if it begins with [ or {, or close the bracket"};
    if (stack_.size() >= static_cast<size_t>(kMaxYamlDepth))
      throw Refused{location(mark), fmt::format("nested deeper than {} levels", kMaxYamlDepth),
                    "a job file needs no more than five"};
    YamlNode node;
    node.kind = kind;
    node.location = location(mark);
    YamlNode* place = append(std::move(node));
    stack_.push_back({place, {}, style == YAML::EmitterStyle::Flow, /*awaits_value=*/false});
  }

  void close() { stack_.pop_back(); }

  int source_;
  const MarkedText& text_;
  Problems& problems_;
  int documents_ = 0;
  YamlNode root_;
  std::vector<Open> stack_;
};

}  // namespace

const YamlNode* YamlNode::find(const std::string& key) const {
  if (kind != Kind::map) return nullptr;
  for (const YamlEntry& entry : entries)
    if (entry.key == key) return &entry.value;
  return nullptr;
}

std::optional<size_t> find_invalid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t k) -> uint32_t {
      return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0;
    };
    const uint32_t lead = byte(0);
    const size_t length = lead < 0x80                   ? 1
                          : lead >= 0xC2 && lead < 0xE0 ? 2
                          : (lead >> 4) == 0xE          ? 3
                          : lead >= 0xF0 && lead < 0xF5 ? 4
                                                        : 0;
    if (length == 0) return i;
    for (size_t k = 1; k < length; ++k)
      if ((byte(k) & 0xC0) != 0x80) return i;
    // Overlong forms, surrogates and values above U+10FFFF.
    if ((lead == 0xE0 && byte(1) < 0xA0) || (lead == 0xED && byte(1) >= 0xA0) ||
        (lead == 0xF0 && byte(1) < 0x90) || (lead == 0xF4 && byte(1) >= 0x90))
      return i;
    i += length;
  }
  return std::nullopt;
}

std::optional<YamlNode> parse_yaml(int source, const std::string& text, Problems& problems) {
  const MarkedText marked(text);
  try {
    if (static_cast<int64_t>(text.size()) > kMaxYamlBytes)
      throw Refused{{source, 0, 0, 1},
                    fmt::format("the file is larger than {} KiB", kMaxYamlBytes / 1024),
                    "a job file is short; is this another file?"};
    check_encoding(source, text);
    check_characters(source, text);
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    TreeBuilder builder(source, marked, problems);
    while (parser.HandleNextDocument(builder)) {
    }
    return builder.take_root();
  } catch (const Refused& refused) {
    problems.add(refused.location, refused.message, refused.hint);
  } catch (const YAML::Exception& e) {
    // Nearly all errors of the library have a position.
    Location place{source, 0, 0, 1};
    if (!e.mark.is_null()) place = {source, e.mark.line + 1, e.mark.column + 1, 1};
    auto [message, hint] = explain_parse_error(e.msg, marked.from(e.mark));
    problems.add(place, std::move(message), std::move(hint));
  }
  return std::nullopt;
}

}  // namespace dstrain
