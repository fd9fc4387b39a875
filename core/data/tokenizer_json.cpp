// Reading tokenizer.json. Every key is known and checked; what this program cannot do exactly as
// Hugging Face tokenizers does it is refused, so that no text is encoded with other ids.
#include "core/data/tokenizer_json.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <unordered_set>

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/data/unicode.h"

namespace dstrain {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 32;

// A value with its path, for errors. A missing value is an absent key; it has a path, too.
class Node {
 public:
  Node(const json* value, std::string path, const std::string& file)
      : value_(value), path_(std::move(path)), file_(file) {}

  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw DataError(
        fmt::format("{}: {} {}", file_, path_, fmt::format(format, std::forward<Args>(args)...)));
  }

  bool missing() const { return value_ == nullptr; }
  bool empty() const { return missing() || value_->is_null(); }
  const std::string& path() const { return path_; }
  size_t size() const { return value_->size(); }

  // The value as an object with no other keys than these.
  const Node& object(std::initializer_list<std::string_view> known) const {
    require(json::value_t::object, "an object");
    for (const auto& [key, unused] : value_->items())
      if (std::find(known.begin(), known.end(), key) == known.end())
        fail("has the key '{}', which is not supported", printable(key));
    return *this;
  }
  const Node& array() const {
    require(json::value_t::array, "a list");
    return *this;
  }
  const json& items() const { return *value_; }

  Node operator[](const std::string& key) const {
    const auto found = value_->find(key);
    return {found == value_->end() ? nullptr : &*found, path_ + "." + printable(key), file_};
  }
  Node operator[](size_t index) const {
    return {&(*value_)[index], fmt::format("{}[{}]", path_, index), file_};
  }

  const std::string& string() const {
    require(json::value_t::string, "a string");
    return value_->get_ref<const std::string&>();
  }
  bool boolean() const {
    require(json::value_t::boolean, "true or false");
    return value_->get<bool>();
  }
  bool boolean_or(bool otherwise) const { return missing() ? otherwise : boolean(); }
  int32_t token_id() const {
    if (missing()) fail("is missing");
    const bool fits = value_->is_number_unsigned() && value_->get<uint64_t>() <= kMaxTokenId;
    if (!fits) fail("is {}, which is no token id (0 to {})", shown(), kMaxTokenId);
    return value_->get<int32_t>();
  }
  // The key "type" of an object.
  std::string type() const {
    require(json::value_t::object, "an object");
    return (*this)["type"].string();
  }
  // For keys with one supported setting: absent, null or that.
  void must_be_unset(const char* allowed) const {
    if (!empty() && value_->dump() != allowed) fail("is {}, which is not supported", shown());
  }

  std::string shown() const { return printable(value_->dump(), 60); }

 private:
  void require(json::value_t type, const char* name) const {
    if (missing()) fail("is missing");
    if (value_->type() != type) fail("must be {}, but is {}", name, shown());
  }

  const json* value_;
  std::string path_;
  const std::string& file_;
};

json parse_strict(std::string_view text, const std::string& file) {
  // nlohmann-json would keep the last of two equal keys in silence. One set per open object.
  std::vector<std::unordered_set<size_t>> keys;  // hashes
  const auto check = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > kMaxDepth)
      throw DataError(fmt::format("{}: nested deeper than {} levels", file, kMaxDepth));
    if (event == json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!keys.back().insert(std::hash<std::string>()(key)).second)
        throw DataError(
            fmt::format("{}: the key '{}' appears twice in one object", file, printable(key)));
    }
    return true;
  };
  try {
    return json::parse(text, check);
  } catch (const json::parse_error& error) {
    std::string what = error.what();
    what = what.substr(0, what.find("; last read"));
    if (const size_t detail = what.find(": "); detail != what.npos) what = what.substr(detail + 2);
    throw DataError(
        fmt::format("{}: not valid JSON at byte {}: {}", file, error.byte, printable(what)));
  } catch (const json::exception& error) {
    throw DataError(fmt::format("{}: not valid JSON: {}", file, printable(error.what())));
  }
}

// ------------------------------------------------------------------ model

using TokenIds = std::unordered_map<std::string_view, int32_t>;

TokenIds read_vocab(const Node& node, BpeSpec& spec) {
  if (node.missing() || !node.items().is_object()) node.fail("must be an object of tokens");
  spec.vocab.reserve(node.size());
  for (const auto& [token, value] : node.items().items()) {
    const bool fits = value.is_number_unsigned() && value.get<uint64_t>() <= kMaxTokenId;
    if (!fits)
      node.fail("has the id {} for the token '{}'; ids are 0 to {}", printable(value.dump(), 60),
                printable(token), kMaxTokenId);
    if (token.empty()) node.fail("has an empty token");
    spec.vocab.emplace_back(token, value.get<int32_t>());
  }
  std::sort(spec.vocab.begin(), spec.vocab.end(),
            [](const auto& a, const auto& b) { return a.second < b.second; });
  TokenIds ids(spec.vocab.size() * 2);
  for (size_t i = 0; i < spec.vocab.size(); ++i) {
    if (i > 0 && spec.vocab[i - 1].second == spec.vocab[i].second)
      node.fail("gives the id {} to '{}' and to '{}'", spec.vocab[i].second,
                printable(spec.vocab[i - 1].first), printable(spec.vocab[i].first));
    ids.emplace(spec.vocab[i].first, spec.vocab[i].second);
  }
  return ids;
}

// Both spellings: "left right" and ["left", "right"].
std::pair<std::string_view, std::string_view> merge_parts(const Node& list, size_t index) {
  const json& value = list.items()[index];
  if (value.is_array() && value.size() == 2 && value[0].is_string() && value[1].is_string())
    return {value[0].get_ref<const std::string&>(), value[1].get_ref<const std::string&>()};
  if (value.is_string()) {
    const std::string_view text = value.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space != text.npos && text.find(' ', space + 1) == text.npos)
      return {text.substr(0, space), text.substr(space + 1)};
  }
  list[index].fail("must be two tokens, as \"a b\" or [\"a\", \"b\"], but is {}",
                   list[index].shown());
}

void read_merges(const Node& node, const TokenIds& ids, BpeSpec& spec) {
  node.array();
  spec.merges.reserve(node.size());
  std::string joined;
  for (size_t i = 0; i < node.size(); ++i) {
    const auto [left, right] = merge_parts(node, i);
    joined.assign(left).append(right);
    BpeSpec::Merge merge;
    const auto find = [&](std::string_view token, int32_t& id) {
      const auto found = ids.find(token);
      if (found == ids.end())
        node[i].fail("needs the token '{}', which $.model.vocab does not have", printable(token));
      id = found->second;
    };
    find(left, merge.left);
    find(right, merge.right);
    find(joined, merge.result);
    spec.merges.push_back(merge);
  }
}

// Returns the ids by token; the views point into spec.vocab.
TokenIds read_model(const Node& node, const std::string& file, BpeSpec& spec) {
  node.object({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
               "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
  if (const Node type = node["type"]; !type.missing() && type.string() != "BPE")
    type.fail("is {}; only BPE is supported", type.shown());
  if (const Node dropout = node["dropout"]; !dropout.empty() && dropout.shown() != "0.0")
    dropout.fail("is {}; only encoding without dropout is supported", dropout.shown());
  node["continuing_subword_prefix"].must_be_unset("\"\"");
  node["end_of_word_suffix"].must_be_unset("\"\"");
  node["byte_fallback"].must_be_unset("false");
  spec.fuse_unk = node["fuse_unk"].boolean_or(false);
  spec.ignore_merges = node["ignore_merges"].boolean_or(false);
  TokenIds ids = read_vocab(node["vocab"], spec);
  if (const Node unk = node["unk_token"]; !unk.empty()) {
    spec.unk_token = unk.string();
    if (!ids.contains(*spec.unk_token))
      unk.fail("is '{}', which $.model.vocab does not have", printable(*spec.unk_token));
  }
  read_merges(node["merges"], ids, spec);
  if (spec.vocab.empty()) throw DataError(fmt::format("{}: $.model.vocab has no tokens", file));
  return ids;
}

// ------------------------------------------------------------------ added tokens

std::vector<AddedToken> read_added_tokens(const Node& node, const TokenIds& vocab) {
  std::vector<AddedToken> tokens;
  if (node.empty()) return tokens;
  node.array();
  std::unordered_set<std::string> seen;
  auto next_id = static_cast<int32_t>(vocab.size());
  for (size_t i = 0; i < node.size(); ++i) {
    const Node item = node[i];
    item.object({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    AddedToken token;
    token.id = item["id"].token_id();
    token.content = item["content"].string();
    token.special = item["special"].boolean();
    token.single_word = item["single_word"].boolean();
    token.lstrip = item["lstrip"].boolean();
    token.rstrip = item["rstrip"].boolean();
    token.normalized = item["normalized"].boolean();
    if (token.content.empty()) item["content"].fail("is empty");
    if (!seen.insert(token.content).second)
      item["content"].fail("is '{}' a second time", printable(token.content));
    // Hugging Face tokenizers ignores the number and assigns ids by this rule.
    const auto in_vocab = vocab.find(token.content);
    const int32_t expected = in_vocab != vocab.end() ? in_vocab->second : next_id;
    if (token.id != expected && in_vocab != vocab.end())
      item["id"].fail("is {}, but $.model.vocab gives '{}' the id {}", token.id,
                      printable(token.content), expected);
    if (token.id != expected)
      item["id"].fail("is {}, but Hugging Face tokenizers would give '{}' the next free id, {}",
                      token.id, printable(token.content), expected);
    next_id = std::max(next_id, token.id + 1);
    tokens.push_back(std::move(token));
  }
  return tokens;
}

// ------------------------------------------------------------------ steps before and after

bool read_normalizer(const Node& node) {
  if (node.empty()) return false;
  const std::string type = node.type();
  if (type == "NFC") {
    node.object({"type"});
    return true;
  }
  if (type != "Sequence") node.fail("is {}; only NFC is supported", printable(type));
  const Node list = node.object({"type", "normalizers"})["normalizers"].array();
  bool nfc = false;
  for (size_t i = 0; i < list.size(); ++i) nfc |= read_normalizer(list[i]);
  return nfc;
}

SplitSpec read_split(const Node& node) {
  node.object({"type", "pattern", "behavior", "invert"});
  SplitSpec split;
  const Node pattern = node["pattern"].object({"Regex", "String"});
  if (pattern.size() != 1) pattern.fail("must have one key, Regex or String");
  split.literal = !pattern["String"].missing();
  split.pattern = pattern[split.literal ? "String" : "Regex"].string();
  if (split.literal && split.pattern.empty()) pattern["String"].fail("is empty");
  const Node behavior = node["behavior"];
  using Behavior = SplitSpec::Behavior;
  const std::pair<const char*, Behavior> known[] = {
      {"Removed", Behavior::removed},
      {"Isolated", Behavior::isolated},
      {"MergedWithPrevious", Behavior::merged_with_previous},
      {"MergedWithNext", Behavior::merged_with_next},
      {"Contiguous", Behavior::contiguous}};
  const auto* found = std::find_if(std::begin(known), std::end(known), [&](const auto& entry) {
    return behavior.string() == entry.first;
  });
  if (found == std::end(known)) behavior.fail("is {}, which is not supported", behavior.shown());
  split.behavior = found->second;
  split.invert = node["invert"].boolean_or(false);
  return split;
}

// Appends the steps of node; `done` tells that the step to bytes has been read.
void read_pretokenizer(const Node& node, PretokenizerSpec& spec, bool& done) {
  const std::string type = node.type();
  if (type == "Sequence") {
    const Node list = node.object({"type", "pretokenizers"})["pretokenizers"].array();
    for (size_t i = 0; i < list.size(); ++i) read_pretokenizer(list[i], spec, done);
    return;
  }
  if (done) node.fail("follows ByteLevel; steps after it are not supported");
  if (type == "Split") {
    spec.splits.emplace_back(read_split(node));
  } else if (type == "Digits") {
    node.object({"type", "individual_digits"});
    spec.splits.emplace_back(DigitsSpec{node["individual_digits"].boolean()});
  } else if (type == "ByteLevel") {
    node.object({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    spec.byte_level = {.add_prefix_space = node["add_prefix_space"].boolean(),
                       .use_regex = node["use_regex"].boolean_or(true),
                       .trim_offsets = node["trim_offsets"].boolean_or(true)};
    done = true;
  } else {
    node.fail("is {}; supported are Sequence, Split, Digits and ByteLevel", printable(type));
  }
}

TemplateSpec read_template(const Node& node) {
  node.object({"type", "single", "pair", "special_tokens"});
  TemplateSpec result;
  const Node parts = node["single"].array();
  const Node specials = node["special_tokens"];
  if (specials.missing() || !specials.items().is_object()) specials.fail("must be an object");
  bool after_text = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Node part = parts[i].object({"SpecialToken", "Sequence"});
    if (part.size() != 1) part.fail("must have one key, SpecialToken or Sequence");
    if (!part["Sequence"].missing()) {
      const Node id = part["Sequence"].object({"id", "type_id"})["id"];
      if (id.string() != "A") id.fail("is {}; a single text is A", id.shown());
      if (after_text) part.fail("is the text a second time");
      after_text = true;
      continue;
    }
    TemplateSpec::Token token{part["SpecialToken"].object({"id", "type_id"})["id"].string(), {}};
    const Node entry = specials[token.content].object({"id", "ids", "tokens"});
    const Node ids = entry["ids"].array();
    for (size_t k = 0; k < ids.size(); ++k) token.ids.push_back(ids[k].token_id());
    (after_text ? result.suffix : result.prefix).push_back(std::move(token));
  }
  if (!after_text) parts.fail("does not contain the text (a Sequence)");
  return result;
}

void read_post_processor(const Node& node, std::optional<TemplateSpec>& result) {
  if (node.empty()) return;
  const std::string type = node.type();
  if (type == "Sequence") {
    const Node list = node.object({"type", "processors"})["processors"].array();
    for (size_t i = 0; i < list.size(); ++i) read_post_processor(list[i], result);
  } else if (type == "TemplateProcessing") {
    if (result) node.fail("is a second template");
    result = read_template(node);
  } else if (type == "ByteLevel") {  // sets offsets only
    node.object({"type", "add_prefix_space", "trim_offsets", "use_regex"});
  } else {
    node.fail("is {}; supported are Sequence, ByteLevel and TemplateProcessing", printable(type));
  }
}

bool read_decoder(const Node& node) {
  if (node.empty()) return false;
  const std::string type = node.type();
  if (type == "Sequence") {
    const Node list = node.object({"type", "decoders"})["decoders"].array();
    if (list.size() != 1) list.fail("must hold ByteLevel and nothing else");
    return read_decoder(list[0]);
  }
  if (type != "ByteLevel") node.fail("is {}; only ByteLevel is supported", printable(type));
  node.object({"type", "add_prefix_space", "trim_offsets", "use_regex"});
  return true;
}

}  // namespace

TokenizerSpec parse_tokenizer_json(std::string_view text, const std::string& name) {
  const json document = parse_strict(text, name);
  const Node root(&document, "$", name);
  root.object({"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
               "post_processor", "decoder", "model"});
  root["version"].must_be_unset("\"1.0\"");
  for (const char* key : {"truncation", "padding"})
    if (!root[key].empty()) log_warning("{}: $.{} is ignored; text is never cut", name, key);

  TokenizerSpec spec;
  const TokenIds vocab = read_model(root["model"], name, spec.model);
  spec.added_tokens = read_added_tokens(root["added_tokens"], vocab);
  spec.nfc = read_normalizer(root["normalizer"]);
  bool has_byte_level = false;
  const Node pretokenizer = root["pre_tokenizer"];
  if (!pretokenizer.empty()) read_pretokenizer(pretokenizer, spec.pretokenizer, has_byte_level);
  if (!has_byte_level)
    pretokenizer.fail("has no ByteLevel step; only byte-level tokenizers are supported");
  read_post_processor(root["post_processor"], spec.post_template);
  spec.byte_level_decoder = read_decoder(root["decoder"]);
  return spec;
}

}  // namespace dstrain
