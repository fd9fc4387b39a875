#include "parallel/random_sequences.h"

#include <algorithm>

#include "core/base/rng.h"

namespace dstrain {
namespace {

constexpr uint64_t kTokens = 0x746f6b656e73, kDocuments = 0x646f6373;

}  // namespace

HostBatch SequenceBatch::view() const {
  return {sequences,
          length,
          tokens_T.data(),
          positions_T.data(),
          targets_T.data(),
          segment_offsets.data(),
          std::ssize(segment_offsets) - 1};
}

int64_t SequenceBatch::valid_tokens() const {
  return std::count_if(targets_T.begin(), targets_T.end(),
                       [](int32_t target) { return target >= 0; });
}

SequenceBatch RandomSequences::batch(int64_t first, int64_t count) const {
  SequenceBatch batch;
  batch.sequences = count;
  batch.length = length_;
  batch.segment_offsets.push_back(0);
  for (int64_t s = first; s < first + count; ++s) append(static_cast<uint64_t>(s), batch);
  return batch;
}

// Documents have two tokens or more, but for what is left at the end of a sequence.
void RandomSequences::append(uint64_t sequence, SequenceBatch& batch) const {
  auto token = [&](int64_t t) {
    return static_cast<int32_t>(random_u64(seed_, kTokens + sequence, static_cast<uint64_t>(t)) %
                                vocab_);
  };
  int64_t begin = 0;
  for (uint64_t document = 0; begin < length_; ++document) {
    const uint64_t draw =
        random_u64(seed_, kDocuments + sequence, document) % static_cast<uint64_t>(length_);
    const int64_t end = std::min<int64_t>(length_, begin + 2 + static_cast<int64_t>(draw));
    for (int64_t t = begin; t < end; ++t) {
      batch.tokens_T.push_back(token(t));
      batch.positions_T.push_back(static_cast<int32_t>(t - begin));
      batch.targets_T.push_back(t + 1 < end ? token(t + 1) : -1);
    }
    batch.segment_offsets.push_back(batch.segment_offsets.back() +
                                    static_cast<int32_t>(end - begin));
    begin = end;
  }
}

}  // namespace dstrain
