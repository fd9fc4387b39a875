// Byte-level byte-pair encoding of one piece: starting from single bytes, the adjacent pair whose
// merge has the lowest rank is joined, leftmost first, until no pair has a merge.
// Tokens are kept as the bytes they stand for; tokenizer.json spells them in the byte-level
// alphabet, where each byte is one printable character (byte_level_encode, byte_level_decode).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/data/tokenizer_spec.h"

namespace dstrain {

// Bytes to the byte-level alphabet.
std::string byte_level_encode(std::string_view bytes);
// Back; nullopt if text holds a character outside the alphabet.
std::optional<std::string> byte_level_decode(std::string_view text);

// Immutable after construction; encode is safe from several threads with a Scratch each.
class BpeModel {
 public:
  // Working memory of one thread.
  class Scratch {
   public:
    // With a cache, words seen before are not merged again; worth its 512 KiB for bulk work.
    explicit Scratch(bool with_cache);
    int64_t unknown_bytes = 0;  // bytes without a token, dropped or mapped to unk so far

   private:
    friend class BpeModel;
    struct CachedWord {
      uint8_t length = 0;  // 0: empty
      uint8_t count = 0;
      char text[22];
      int32_t ids[10];
    };
    struct Symbol {
      int32_t id;
      int32_t previous, next;  // indices; -1: none
    };
    struct Candidate {
      int32_t rank, position, result;
    };
    std::vector<CachedWord> cache_;
    std::vector<int32_t> ids_;
    std::vector<Symbol> symbols_;
    std::vector<Candidate> heap_;
  };

  // The spec must be consistent: ids in range and unique, merges between known tokens.
  explicit BpeModel(const BpeSpec& spec);
  ~BpeModel();
  BpeModel(BpeModel&&) noexcept;
  BpeModel& operator=(BpeModel&&) noexcept;

  // Appends the ids of a piece. Time is about linear: a piece of n bytes takes O(n log n).
  void encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const;

  // Number of byte values that have no token.
  int missing_bytes() const;

 private:
  struct Merge {
    int32_t rank, result;
  };
  class MergeTable;
  class WordTable;

  void merge(std::string_view piece, Scratch& scratch) const;  // leaves the ids in scratch.ids_
  void load_bytes(std::string_view piece, Scratch& scratch) const;
  void merge_short(Scratch& scratch) const;
  void merge_long(Scratch& scratch) const;
  void find_whole_words(const BpeSpec& spec);

  std::array<int32_t, 256> byte_ids_;  // -1: no token
  int32_t unk_id_ = -1;
  bool fuse_unk_ = false;
  std::unique_ptr<MergeTable> merges_;
  std::unique_ptr<WordTable> words_;
};

}  // namespace dstrain
