// Writing tokenizer.json.
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/data/tokenizer_json.h"

namespace dstrain {
namespace {

using json = nlohmann::ordered_json;

json byte_level(const ByteLevelSpec& spec) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", spec.add_prefix_space},
          {"trim_offsets", spec.trim_offsets},
          {"use_regex", spec.use_regex}};
}

const char* behavior_name(SplitSpec::Behavior behavior) {
  switch (behavior) {
    case SplitSpec::Behavior::removed:
      return "Removed";
    case SplitSpec::Behavior::isolated:
      return "Isolated";
    case SplitSpec::Behavior::merged_with_previous:
      return "MergedWithPrevious";
    case SplitSpec::Behavior::merged_with_next:
      return "MergedWithNext";
    case SplitSpec::Behavior::contiguous:
      return "Contiguous";
  }
  DSTRAIN_CHECK(false, "unknown split behavior");
  return "";
}

json pretokenizer(const PretokenizerSpec& spec) {
  if (spec.splits.empty()) return byte_level(spec.byte_level);
  json steps = json::array();
  for (const auto& step : spec.splits) {
    if (const auto* digits = std::get_if<DigitsSpec>(&step)) {
      steps.push_back({{"type", "Digits"}, {"individual_digits", digits->individual}});
    } else {
      const auto& split = std::get<SplitSpec>(step);
      steps.push_back({{"type", "Split"},
                       {"pattern", {{split.literal ? "String" : "Regex", split.pattern}}},
                       {"behavior", behavior_name(split.behavior)},
                       {"invert", split.invert}});
    }
  }
  steps.push_back(byte_level(spec.byte_level));
  return {{"type", "Sequence"}, {"pretokenizers", std::move(steps)}};
}

// A pair of texts is encoded as two single ones.
json post_processor(const TemplateSpec& spec) {
  json single = json::array(), pair = json::array(), specials = json::object();
  const auto add_frame = [&](const std::vector<TemplateSpec::Token>& tokens, json& parts,
                             int type_id) {
    for (const auto& token : tokens) {
      parts.push_back({{"SpecialToken", {{"id", token.content}, {"type_id", type_id}}}});
      json names = json::array();
      for (size_t i = 0; i < token.ids.size(); ++i) names.push_back(token.content);
      specials[token.content] = {{"id", token.content}, {"ids", token.ids}, {"tokens", names}};
    }
  };
  const auto add_text = [&](const char* id, json& parts, int type_id) {
    add_frame(spec.prefix, parts, type_id);
    parts.push_back({{"Sequence", {{"id", id}, {"type_id", type_id}}}});
    add_frame(spec.suffix, parts, type_id);
  };
  add_text("A", single, 0);
  add_text("A", pair, 0);
  add_text("B", pair, 1);
  return {{"type", "TemplateProcessing"},
          {"single", std::move(single)},
          {"pair", std::move(pair)},
          {"special_tokens", std::move(specials)}};
}

// Merges as "left right", the spelling that every reader knows; as pairs if a token has a space.
json merges(const BpeSpec& spec, const std::vector<const std::string*>& tokens) {
  bool spaces = false;
  for (const auto& [token, id] : spec.vocab) spaces |= token.find(' ') != token.npos;
  json list = json::array();
  for (const BpeSpec::Merge& merge : spec.merges) {
    const std::string& left = *tokens[static_cast<size_t>(merge.left)];
    const std::string& right = *tokens[static_cast<size_t>(merge.right)];
    if (spaces) {
      list.push_back(json::array({left, right}));
    } else {
      list.push_back(left + " " + right);
    }
  }
  return list;
}

json model(const BpeSpec& spec) {
  std::vector<const std::string*> tokens;  // by id
  // ordered_json searches all keys on insertion; building its storage directly stays linear.
  json::object_t vocab;
  vocab.Container::reserve(spec.vocab.size());
  for (const auto& [token, id] : spec.vocab) {
    if (static_cast<size_t>(id) >= tokens.size()) tokens.resize(static_cast<size_t>(id) + 1);
    tokens[static_cast<size_t>(id)] = &token;
    vocab.Container::emplace_back(token, id);
  }
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", spec.unk_token ? json(*spec.unk_token) : json()},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", spec.fuse_unk},
          {"byte_fallback", false},
          {"ignore_merges", spec.ignore_merges},
          {"vocab", std::move(vocab)},
          {"merges", merges(spec, tokens)}};
}

}  // namespace

std::string write_tokenizer_json(const TokenizerSpec& spec) {
  json added = json::array();
  for (const AddedToken& token : spec.added_tokens)
    added.push_back({{"id", token.id},
                     {"content", token.content},
                     {"single_word", token.single_word},
                     {"lstrip", token.lstrip},
                     {"rstrip", token.rstrip},
                     {"normalized", token.normalized},
                     {"special", token.special}});
  // A null decoder joins tokens with spaces; it is kept as it was read.
  json decoder;
  if (spec.byte_level_decoder) decoder = byte_level(ByteLevelSpec{.add_prefix_space = true});
  const json document = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", std::move(added)},
      {"normalizer", spec.nfc ? json{{"type", "NFC"}} : json()},
      {"pre_tokenizer", pretokenizer(spec.pretokenizer)},
      {"post_processor", spec.post_template ? post_processor(*spec.post_template) : json()},
      {"decoder", std::move(decoder)},
      {"model", model(spec.model)}};
  return document.dump(2) + "\n";
}

}  // namespace dstrain
