// Which source gives the next sample, for weighted sources.
//
// After n samples each source has given floor(w n) or ceil(w n) of them, w being its share of the
// weights, so its count is off by less than 1. Among the sources that may give another sample
// without exceeding ceil(w n), the one whose next sample is due first does: smallest (count + 1) /
// w, the earlier source on a tie. (This is the quota method of apportionment, Balinski and Young
// 1975; taking the largest deficit alone can fall behind by more than 1.) The arithmetic is exact.
#pragma once

#include <cstdint>
#include <vector>

namespace dstrain {

class Blend {
 public:
  struct Draw {
    int64_t source;
    int64_t index;  // counts the source's own samples from 0
  };

  // Weights are finite and positive. Weights below 2^-53 of the largest are rounded up to that.
  explicit Blend(const std::vector<double>& weights);

  // The draw at position(), which goes on by one.
  Draw next();
  int64_t position() const { return position_; }
  // Takes a few ns per skipped position and source; nothing with one source. Forward only.
  void skip_to(int64_t position);

 private:
  std::vector<int64_t> weights_;  // integers in the ratio of the weights
  __int128 total_ = 0;
  std::vector<int64_t> counts_;
  int64_t position_ = 0;
};

}  // namespace dstrain
