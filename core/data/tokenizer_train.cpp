#include "core/data/tokenizer_train.h"

#include <fmt/format.h>

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "core/base/error.h"
#include "core/data/bpe.h"
#include "core/data/pretokenizer.h"
#include "core/data/tokenizer_train_count.h"
#include "core/data/unicode.h"

namespace dstrain {
namespace {

struct Pair {
  int32_t left, right;
  bool operator==(const Pair&) const = default;
};
struct PairHash {
  size_t operator()(const Pair& p) const {
    const uint64_t key =
        uint64_t{static_cast<uint32_t>(p.left)} << 32 | static_cast<uint32_t>(p.right);
    const uint64_t mixed = key * 0x9E3779B97F4A7C15;
    return mixed ^ mixed >> 32;
  }
};

// Indices of words, without repeats in a row.
using WordList = std::vector<int32_t>;

void add_word(WordList& list, int32_t word) {
  if (list.empty() || list.back() != word) list.push_back(word);
}

// The merge loop. A pair's queue entry can be outdated; it is checked against the true count when
// it comes up. An entry lists the words in which the pair appeared since the entry before it.
class MergeFinder {
 public:
  MergeFinder(const WordCounts& words, std::vector<std::string> tokens)
      : tokens_(std::move(tokens)) {
    for (size_t id = 0; id < tokens_.size(); ++id) ids_[tokens_[id]] = static_cast<int32_t>(id);
    std::array<int32_t, 256> byte_ids;
    for (size_t b = 0; b < 256; ++b)
      byte_ids[b] = ids_.at(byte_level_encode(std::string(1, static_cast<char>(b))));
    words_.reserve(words.size());
    for (const auto& [text, count] : words) {
      Word word{static_cast<int64_t>(symbols_.size()), static_cast<int32_t>(text.size()), count};
      for (const char c : text) symbols_.push_back(byte_ids[static_cast<unsigned char>(c)]);
      words_.push_back(word);
    }
  }

  void run(int64_t vocab_size, int64_t min_frequency) {
    count_pairs();
    while (static_cast<int64_t>(tokens_.size()) < vocab_size && !queue_.empty()) {
      std::pop_heap(queue_.begin(), queue_.end(), Entry::later);
      Entry best = std::move(queue_.back());
      queue_.pop_back();
      const int64_t count = counts_[best.pair];
      if (best.count != count) {
        best.count = count;
        push(std::move(best));
        continue;
      }
      if (count < std::max<int64_t>(1, min_frequency)) break;
      merge(best.pair, best.words);
    }
  }

  const std::vector<std::string>& tokens() const { return tokens_; }

  // By rank. A pair that was merged in two steps counts with the second, as a tokenizer that reads
  // both would have it.
  std::vector<BpeSpec::Merge> merges() const {
    std::vector<BpeSpec::Merge> result;
    std::unordered_set<Pair, PairHash> seen;
    for (auto merge = merges_.rbegin(); merge != merges_.rend(); ++merge)
      if (seen.insert({merge->left, merge->right}).second) result.push_back(*merge);
    std::reverse(result.begin(), result.end());
    return result;
  }

 private:
  struct Word {
    int64_t begin;   // in symbols_
    int32_t length;  // shrinks as symbols merge
    int64_t count;
  };
  struct Entry {
    int64_t count;
    Pair pair;
    int64_t sequence;  // order of insertion, the last tie-breaker
    WordList words;

    static bool later(const Entry& a, const Entry& b) {
      if (a.count != b.count) return a.count < b.count;
      if (a.pair.left != b.pair.left) return a.pair.left > b.pair.left;
      if (a.pair.right != b.pair.right) return a.pair.right > b.pair.right;
      return a.sequence > b.sequence;
    }
  };
  using Updates = std::unordered_map<Pair, WordList, PairHash>;

  void push(Entry entry) {
    queue_.push_back(std::move(entry));
    std::push_heap(queue_.begin(), queue_.end(), Entry::later);
  }

  void push_all(Updates& updates) {
    // Sorted, so that the sequence numbers do not depend on the hash table.
    std::vector<Pair> pairs;
    for (const auto& [pair, unused] : updates) pairs.push_back(pair);
    std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
      return a.left != b.left ? a.left < b.left : a.right < b.right;
    });
    for (const Pair& pair : pairs)
      if (const int64_t count = counts_[pair]; count > 0)
        push({count, pair, sequence_++, std::move(updates[pair])});
  }

  void count_pairs() {
    Updates updates;
    for (size_t w = 0; w < words_.size(); ++w) {
      const Word& word = words_[w];
      for (int32_t i = 0; i + 1 < word.length; ++i) {
        const int32_t* symbol = &symbols_[static_cast<size_t>(word.begin + i)];
        const Pair pair{symbol[0], symbol[1]};
        counts_[pair] += word.count;
        add_word(updates[pair], static_cast<int32_t>(w));
      }
    }
    push_all(updates);
  }

  void merge(const Pair& pair, const WordList& where) {
    const std::string text =
        tokens_[static_cast<size_t>(pair.left)] + tokens_[static_cast<size_t>(pair.right)];
    const auto [place, is_new] = ids_.try_emplace(text, static_cast<int32_t>(tokens_.size()));
    if (is_new) tokens_.push_back(text);
    const int32_t result = place->second;
    merges_.push_back({pair.left, pair.right, result});
    Updates updates;
    for (const int32_t w : where) merge_in_word(pair, result, w, updates);
    push_all(updates);
  }

  void merge_in_word(const Pair& pair, int32_t result, int32_t index, Updates& updates) {
    Word& word = words_[static_cast<size_t>(index)];
    int32_t* const symbols = &symbols_[static_cast<size_t>(word.begin)];
    const auto gain = [&](Pair formed) {
      counts_[formed] += word.count;
      add_word(updates[formed], index);
    };
    int32_t kept = 0;  // symbols[0, kept) are final
    for (int32_t i = 0; i < word.length; ++i) {
      const bool matches =
          i + 1 < word.length && symbols[i] == pair.left && symbols[i + 1] == pair.right;
      if (!matches) {
        symbols[kept++] = symbols[i];
        continue;
      }
      if (kept > 0) {
        counts_[{symbols[kept - 1], pair.left}] -= word.count;
        gain({symbols[kept - 1], result});
      }
      if (i + 2 < word.length) {
        counts_[{pair.right, symbols[i + 2]}] -= word.count;
        gain({result, symbols[i + 2]});
      }
      symbols[kept++] = result;
      ++i;
    }
    word.length = kept;
  }

  std::vector<std::string> tokens_;  // by id
  std::unordered_map<std::string, int32_t> ids_;
  std::vector<int32_t> symbols_;
  std::vector<Word> words_;
  std::unordered_map<Pair, int64_t, PairHash> counts_;
  std::vector<Entry> queue_;  // a heap
  int64_t sequence_ = 0;
  std::vector<BpeSpec::Merge> merges_;
};

// Special tokens, then the bytes in the order of their characters.
std::vector<std::string> first_tokens(const BpeTrainOptions& options) {
  std::vector<std::string> bytes;
  for (int b = 0; b < 256; ++b)
    bytes.push_back(byte_level_encode(std::string(1, static_cast<char>(b))));
  std::sort(bytes.begin(), bytes.end());  // UTF-8 sorts as its code points do
  std::vector<std::string> tokens = options.special_tokens;
  tokens.insert(tokens.end(), bytes.begin(), bytes.end());
  return tokens;
}

void check_options(const BpeTrainOptions& options) {
  std::unordered_set<std::string> seen;
  for (const std::string& token : options.special_tokens) {
    if (token.empty()) throw UsageError("a special token is empty");
    if (valid_utf8_prefix(token) != token.size())
      throw UsageError(fmt::format("the special token '{}' is not valid UTF-8", printable(token)));
    if (const auto bytes = byte_level_decode(token); bytes && bytes->size() == 1)
      throw UsageError(fmt::format(
          "the special token '{}' is one character, which stands for a byte; use a longer one",
          token));
    if (!seen.insert(token).second)
      throw UsageError(fmt::format("the special token '{}' is given twice", printable(token)));
  }
  const auto least = static_cast<int64_t>(256 + options.special_tokens.size());
  if (options.vocab_size < least || options.vocab_size > int64_t{kMaxTokenId} + 1)
    throw UsageError(fmt::format(
        "the vocabulary size {} is out of range: at least {} (256 bytes and {} special tokens), at "
        "most {}",
        options.vocab_size, least, options.special_tokens.size(), int64_t{kMaxTokenId} + 1));
}

}  // namespace

TokenizerSpec train_bpe(const BpeTrainOptions& options, BpeTrainReport& report) {
  check_options(options);
  const WordCounts words = count_words(options, report);
  if (words.empty()) throw DataError("the inputs hold no text to train a tokenizer on");
  DSTRAIN_CHECK(words.size() < INT32_MAX, "more than 2^31 distinct words");

  MergeFinder finder(words, first_tokens(options));
  finder.run(options.vocab_size, options.min_frequency);

  TokenizerSpec spec;
  for (size_t i = 0; i < options.special_tokens.size(); ++i)
    spec.added_tokens.push_back(
        {.id = static_cast<int32_t>(i), .content = options.special_tokens[i], .special = true});
  spec.pretokenizer = pretokenizer_preset(options.pattern);
  spec.nfc = options.pattern == "qwen2";
  for (size_t id = 0; id < finder.tokens().size(); ++id)
    spec.model.vocab.emplace_back(finder.tokens()[id], static_cast<int32_t>(id));
  spec.model.merges = finder.merges();
  report.vocab_size = static_cast<int64_t>(finder.tokens().size());
  return spec;
}

}  // namespace dstrain
