// Tokens in the order of their rows of an embedding: stably, by counting digits of up to nine bits
// from the lowest on. One launch numbers the tokens and one more a digit moves them, so that a sort
// of the tokens of a micro-batch takes three.
#pragma once

#include <cstdint>

#include "cuda/cuda_device.h"

namespace dstrain {

struct TokenSort {
  // T tokens, V rows of the vocabulary here.
  TokenSort(int64_t T, int64_t V);
  int64_t scratch_bytes() const;

  // The rows' numbers, ascending, V for tokens that are not here, and where the tokens stand.
  struct Sorted {
    const uint32_t* keys_T;
    const int32_t* positions_T;
  };
  // T > 0 tokens of which vocab_begin .. vocab_begin + V - 1 are here. Sets used_V (where not null)
  // to 1 at their rows.
  Sorted run(Stream& stream, ScratchPieces& scratch, const int32_t* tokens_T, int64_t vocab_begin,
             uint8_t* used_V) const;

 private:
  int tokens_, rows_;
  int passes_, digit_bits_;
  int run_length_, runs_;  // a block has a run of tokens
};

}  // namespace dstrain
