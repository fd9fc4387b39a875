#include "core/data/bigram.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr int64_t kMaxId = 1 << 24;
constexpr int64_t kReadTokens = 1 << 16;
constexpr size_t kPairsPerSort = 1 << 23;

uint64_t pair_key(int32_t a, int32_t b) {
  return uint64_t{static_cast<uint32_t>(a)} << 32 | static_cast<uint32_t>(b);
}

// Calls visit(ids, starts_document) for runs of up to kReadTokens tokens, over all documents that
// start before max_tokens. A run overlaps the one before it in its document by one token.
template <class Visit>
void for_each_run(const TokenDataset& dataset, int64_t max_tokens, Visit&& visit) {
  std::vector<int32_t> ids;
  for (int64_t d = 0; d < dataset.num_documents(); ++d) {
    const TokenRange range = dataset.document_range(d);
    if (range.begin >= max_tokens) break;
    for (int64_t at = range.begin; at < range.end; at += kReadTokens - 1) {
      const int64_t n = std::min(kReadTokens, range.end - at);
      if (at > range.begin && n == 1) break;  // seen as the end of the run before
      ids.resize(static_cast<size_t>(n));
      dataset.read(at, n, ids.data());
      check_token_ids(dataset, at, ids.data(), n, kMaxId);
      visit(ids, at == range.begin);
    }
  }
}

// Pair counts as a sorted list, and the counts that follow from the tokens.
class BigramCounts {
 public:
  BigramCounts(const TokenDataset& train, int64_t max_tokens) {
    for_each_run(train, max_tokens, [&](const std::vector<int32_t>& ids, bool starts_document) {
      for (size_t i = starts_document ? 0 : 1; i < ids.size(); ++i) count_token(ids[i]);
      for (size_t i = 1; i < ids.size(); ++i) pending_.push_back(pair_key(ids[i - 1], ids[i]));
      if (pending_.size() >= kPairsPerSort) merge_pending();
    });
    merge_pending();
    contexts_.resize(tokens_.size());
    for (const Entry& entry : pairs_) contexts_[entry.key >> 32] += entry.count;
  }

  int64_t tokens() const { return num_tokens_; }
  int64_t pairs() const { return std::ssize(pairs_); }

  // vocabulary: number of ids that share the probability of unseen tokens.
  double log2_probability(int32_t a, int32_t b, double delta, int64_t vocabulary) const {
    const uint64_t key = pair_key(a, b);
    const auto found =
        std::lower_bound(pairs_.begin(), pairs_.end(), key,
                         [](const Entry& entry, uint64_t wanted) { return entry.key < wanted; });
    const int64_t pair = found != pairs_.end() && found->key == key ? found->count : 0;
    return log2_of(pair, of(contexts_, a), of(tokens_, b), delta, vocabulary);
  }

  // Bits of all pairs, each scored by the counts without itself.
  double leave_one_out_bits(double delta, int64_t vocabulary) const {
    double bits = 0;
    for (const Entry& entry : pairs_)
      bits -= static_cast<double>(entry.count) *
              log2_of(entry.count - 1, contexts_[entry.key >> 32] - 1,
                      tokens_[entry.key & 0xffffffff], delta, vocabulary);
    return bits;
  }

 private:
  struct Entry {
    uint64_t key;
    int64_t count;
  };

  static int64_t of(const std::vector<int64_t>& counts, int32_t id) {
    return id < std::ssize(counts) ? counts[id] : 0;
  }

  double log2_of(int64_t pair, int64_t context, int64_t token, double delta,
                 int64_t vocabulary) const {
    const double unigram =
        static_cast<double>(token + 1) / static_cast<double>(num_tokens_ + vocabulary);
    return std::log2((static_cast<double>(pair) + delta * unigram) /
                     (static_cast<double>(context) + delta));
  }

  void count_token(int32_t id) {
    if (id >= std::ssize(tokens_)) tokens_.resize(static_cast<size_t>(id) + 1);
    ++tokens_[id];
    ++num_tokens_;
  }

  void merge_pending() {
    std::sort(pending_.begin(), pending_.end());
    std::vector<Entry> merged;
    auto old = pairs_.begin();
    for (size_t i = 0; i < pending_.size();) {
      const size_t begin = i;
      while (i < pending_.size() && pending_[i] == pending_[begin]) ++i;
      Entry entry{pending_[begin], static_cast<int64_t>(i - begin)};
      while (old != pairs_.end() && old->key < entry.key) merged.push_back(*old++);
      if (old != pairs_.end() && old->key == entry.key) entry.count += (old++)->count;
      merged.push_back(entry);
    }
    merged.insert(merged.end(), old, pairs_.end());
    pairs_ = std::move(merged);
    pending_.clear();
  }

  std::vector<uint64_t> pending_;
  std::vector<Entry> pairs_;
  std::vector<int64_t> tokens_, contexts_;  // by id
  int64_t num_tokens_ = 0;
};

double best_delta(const BigramCounts& counts, int64_t vocabulary) {
  double best = 0, least_bits = INFINITY;
  for (int exponent = -4; exponent <= 16; ++exponent) {
    const double delta = std::exp2(exponent);
    const double bits = counts.leave_one_out_bits(delta, vocabulary);
    if (bits >= least_bits) continue;
    least_bits = bits;
    best = delta;
  }
  return best;
}

}  // namespace

BigramScore score_bigram(const TokenDataset& train, const TokenDataset& valid,
                         int64_t max_train_tokens) {
  const BigramCounts counts(train, max_train_tokens);
  const auto no_pairs = [](const TokenDataset& dataset) {
    return DataError(
        fmt::format("'{}' has no document of two tokens: there are no bigrams", dataset.path()));
  };
  if (counts.pairs() == 0) throw no_pairs(train);
  // Megatron files do not record their vocabulary; the bound is what their type can hold.
  const int64_t vocabulary = std::min({train.vocab_size(), valid.vocab_size(), kMaxId});

  BigramScore score;
  score.train_tokens = counts.tokens();
  score.delta = best_delta(counts, vocabulary);
  double bits = 0;
  for_each_run(valid, valid.num_tokens(), [&](const std::vector<int32_t>& ids, bool) {
    for (size_t i = 1; i < ids.size(); ++i)
      bits -= counts.log2_probability(ids[i - 1], ids[i], score.delta, vocabulary);
    score.targets += std::ssize(ids) - 1;
  });
  if (score.targets == 0) throw no_pairs(valid);
  score.bits_per_token = bits / static_cast<double>(score.targets);
  if (valid.text_bytes() > 0) score.bits_per_byte = bits / static_cast<double>(valid.text_bytes());
  return score;
}

}  // namespace dstrain
