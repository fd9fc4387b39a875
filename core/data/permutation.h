// A random order of [0, n) that needs no memory: a keyed bijection on the next power of two, walked
// until the value is below n. Any element of the order can be asked for alone.
//
// The bijection is a Feistel network. Its round keys come from Philox; the round function is the
// 64-bit finaliser of MurmurHash3, since an order is asked for once or twice per document read.
#pragma once

#include <cstdint>

#include "core/base/rng.h"

namespace dstrain {

class Permutation {
 public:
  // n >= 0. The order is a pure function of (n, key).
  Permutation(int64_t n, uint64_t key) : n_(n) {
    int bits = 0;
    while (bits < 62 && (int64_t{1} << bits) < n) ++bits;
    // On tiny domains a round mixes little: 6 rounds leave an order of 5 visibly uneven, 16 do not.
    rounds_ = bits < 8 ? 16 : 6;
    for (int round = 0; round < rounds_; ++round) keys_[round] = random_u64(key, 0, round);
    low_bits_ = bits / 2;
    low_mask_ = (uint64_t{1} << low_bits_) - 1;
    high_mask_ = (uint64_t{1} << (bits - low_bits_)) - 1;
  }

  int64_t size() const { return n_; }

  // The element at place i of [0, n). Takes some 50 ns.
  int64_t operator()(int64_t i) const {
    uint64_t value = static_cast<uint64_t>(i);
    do value = encrypt(value);
    while (value >= static_cast<uint64_t>(n_));
    return static_cast<int64_t>(value);
  }

 private:
  static constexpr int kMaxRounds = 16;

  static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 33) * 0xff51afd7ed558ccd;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53;
    return x ^ x >> 33;
  }

  uint64_t encrypt(uint64_t value) const {
    uint64_t low = value & low_mask_, high = value >> low_bits_;
    for (int round = 0; round < rounds_; round += 2) {
      high ^= mix(low ^ keys_[round]) & high_mask_;
      low ^= mix(high ^ keys_[round + 1]) & low_mask_;
    }
    return high << low_bits_ | low;
  }

  int64_t n_;
  int rounds_;
  int low_bits_;
  uint64_t low_mask_, high_mask_;
  uint64_t keys_[kMaxRounds];
};

}  // namespace dstrain
