#include "core/data/tokenizer_added.h"

#include <algorithm>

#include "core/data/unicode.h"

namespace dstrain {
namespace {

uint64_t edge(uint32_t node, char byte) {
  return uint64_t{node} << 8 | static_cast<unsigned char>(byte);
}

}  // namespace

void AddedTokenFinder::add(const AddedToken& token, std::string_view content) {
  if (content.empty()) return;
  uint32_t node = 0;
  for (const char c : content) {
    const auto [place, is_new] =
        edges_.try_emplace(edge(node, c), static_cast<uint32_t>(nodes_.size()));
    if (is_new) nodes_.emplace_back();
    node = place->second;
  }
  if (nodes_[node].token >= 0) return;
  nodes_[node].token = static_cast<int32_t>(tokens_.size());
  tokens_.push_back({token.id, token.single_word, token.lstrip, token.rstrip});
  starts_[static_cast<unsigned char>(content[0])] = true;
}

bool AddedTokenFinder::find(std::string_view text, size_t from, Match& match) const {
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_[static_cast<unsigned char>(text[begin])]) continue;
    int32_t longest = -1;
    uint32_t node = 0;
    for (size_t at = begin; at < text.size(); ++at) {
      const auto next = edges_.find(edge(node, text[at]));
      if (next == edges_.end()) break;
      node = next->second;
      if (nodes_[node].token < 0) continue;
      longest = nodes_[node].token;
      match = {begin, at + 1, static_cast<size_t>(longest)};
    }
    if (longest >= 0) return true;
  }
  return false;
}

// Checks single_word and widens the match by what lstrip and rstrip take; `done` is where the
// previous match ended. Returns false if the match does not count.
bool AddedTokenFinder::apply_options(std::string_view text, size_t done, Match& match) const {
  const Token& token = tokens_[match.token];
  const char* const text_begin = text.data();
  const char* const text_end = text_begin + text.size();
  const char* begin = text_begin + match.begin;
  const char* end = text_begin + match.end;
  const auto has = [](const char* p, uint8_t mask) {
    return (char_classes(decode_utf8(p).code_point) & mask) != 0;
  };
  if (token.single_word) {
    const bool joined_left = begin > text_begin && has(previous_utf8(begin), kWord);
    const bool joined_right = end < text_end && has(end, kWord);
    if (joined_left || joined_right) return false;
  }
  if (token.lstrip) {
    while (begin > text_begin && has(previous_utf8(begin), kSpace)) begin = previous_utf8(begin);
    match.begin = std::max(static_cast<size_t>(begin - text_begin), done);
  }
  if (token.rstrip) {
    while (end < text_end && has(end, kSpace)) end += decode_utf8(end).length;
    match.end = static_cast<size_t>(end - text_begin);
  }
  return true;
}

}  // namespace dstrain
