// A bigram model as the yardstick of a trained one: what does knowing the previous token alone
// give?
//
//   p(b | a) = (c(a, b) + delta p(b)) / (c(a) + delta)      counts c within documents of TRAIN
//   p(b)     = (c(b) + 1) / (tokens + vocabulary)
//
// delta is the power of two in [2^-4, 2^16] under which TRAIN itself is likeliest when every pair
// is scored with itself left out of the counts; the scored dataset has no say in it. The targets
// are those of training: each token of a document but its first.
#pragma once

#include <cstdint>

#include "core/data/token_dataset.h"

namespace dstrain {

struct BigramScore {
  int64_t train_tokens = 0;  // counted
  double delta = 0;
  int64_t targets = 0;  // scored
  double bits_per_token = 0;
  double bits_per_byte = -1;  // over the text of the scored dataset; -1 if its size is not recorded
};

// Counts the first max_train_tokens tokens of `train` and scores all of `valid`. Takes 16 bytes of
// memory per distinct pair. DataError if a dataset is damaged, holds an id of 2^24 or more, or has
// no document of two tokens.
BigramScore score_bigram(const TokenDataset& train, const TokenDataset& valid,
                         int64_t max_train_tokens = int64_t{1} << 28);

}  // namespace dstrain
