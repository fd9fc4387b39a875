// Finds added tokens (special tokens and others that bypass BPE) in text.
#pragma once

#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/data/tokenizer_spec.h"

namespace dstrain {

// Immutable after construction; const calls are thread-safe.
class AddedTokenFinder {
 public:
  // Matches `content`, which is the token's own or its normalized form. Of equal ones the first
  // counts.
  void add(const AddedToken& token, std::string_view content);
  bool empty() const { return tokens_.empty(); }

  // Calls on_text(view) and on_token(id) for the parts of text in order. Leftmost matches win, of
  // those at one place the longest. Whitespace that a token strips belongs to no part.
  template <class OnText, class OnToken>
  void for_each_part(std::string_view text, const OnText& on_text, const OnToken& on_token) const {
    size_t done = 0;
    Match match;
    for (size_t from = 0; !tokens_.empty() && find(text, from, match);) {
      from = match.end;
      if (!apply_options(text, done, match)) continue;
      if (done < match.begin) on_text(text.substr(done, match.begin - done));
      // Whitespace that the token before has stripped may have been all of this one.
      if (match.begin < match.end) on_token(tokens_[match.token].id);
      done = match.end;
    }
    if (done < text.size()) on_text(text.substr(done));
  }

 private:
  struct Token {
    int32_t id;
    bool single_word, lstrip, rstrip;
  };
  struct Match {
    size_t begin = 0, end = 0;
    size_t token = 0;  // index into tokens_
  };
  struct Node {
    int32_t token = -1;
  };

  bool find(std::string_view text, size_t from, Match& match) const;
  bool apply_options(std::string_view text, size_t done, Match& match) const;

  std::vector<Token> tokens_;
  std::vector<Node> nodes_{Node{}};               // of the trie; 0 is the root
  std::unordered_map<uint64_t, uint32_t> edges_;  // node << 8 | byte -> node
  bool starts_[256] = {};                         // bytes that begin a token
};

}  // namespace dstrain
