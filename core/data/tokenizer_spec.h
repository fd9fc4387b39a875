// What a tokenizer.json says, as plain values. tokenizer_json.h reads and writes it, train_bpe
// produces it, Tokenizer runs it. Only byte-level BPE can be expressed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace dstrain {

// Ids at or above this are refused: they can only come from a damaged file.
inline constexpr int32_t kMaxTokenId = (1 << 24) - 1;

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;      // decode may skip it
  bool single_word = false;  // matches only where no word character touches it
  bool lstrip = false;       // takes the whitespace before it
  bool rstrip = false;       // takes the whitespace after it
  bool normalized = false;   // matches in normalized text
};

// Cuts text at the matches of a pattern.
struct SplitSpec {
  enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };
  std::string pattern;
  bool literal = false;  // pattern is text to find, not a regular expression
  Behavior behavior = Behavior::isolated;
  bool invert = false;  // matches and gaps change roles
};

// Cuts at numbers: every digit alone, or each run of them.
struct DigitsSpec {
  bool individual = false;
};

// The step to bytes; always the last one.
struct ByteLevelSpec {
  bool add_prefix_space = false;
  bool use_regex = true;     // cut with the GPT-2 pattern
  bool trim_offsets = true;  // kept for saving; has no influence on ids
};

struct PretokenizerSpec {
  std::vector<std::variant<SplitSpec, DigitsSpec>> splits;  // applied in order, each to all pieces
  ByteLevelSpec byte_level;
};

struct BpeSpec {
  struct Merge {
    int32_t left = 0, right = 0, result = 0;
  };
  std::vector<std::pair<std::string, int32_t>> vocab;  // token in the byte-level alphabet, id
  std::vector<Merge> merges;                           // by rank
  bool ignore_merges = false;  // a piece that is a token stays whole, whatever the merges say
  std::optional<std::string> unk_token;
  bool fuse_unk = false;
};

// Ids put around a text when special tokens are asked for.
struct TemplateSpec {
  struct Token {
    std::string content;
    std::vector<int32_t> ids;
  };
  std::vector<Token> prefix, suffix;
};

struct TokenizerSpec {
  std::vector<AddedToken> added_tokens;
  bool nfc = false;
  PretokenizerSpec pretokenizer;
  std::optional<TemplateSpec> post_template;
  bool byte_level_decoder = true;  // false: decode joins the tokens with spaces, as written
  BpeSpec model;
};

}  // namespace dstrain
