// The order of samples over a whole run: which source, epoch and sample each global sample index
// stands for. A pure function of (sources, options, index); ranks and batch sizes do not enter.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/data/blend.h"
#include "core/data/packer.h"
#include "core/data/token_dataset.h"

namespace dstrain {

struct BatchSource {
  const TokenDataset* dataset = nullptr;  // must outlive its users
  double weight = 1.0;
};

struct SampleRef {
  int64_t id = -1;  // global sample index; -1 stands for a sequence of pads
  int64_t source = 0;
  int64_t epoch = 0;  // of the source
  int64_t k = 0;      // sample of that epoch
};

// Goes through the samples by ascending global index. One thread at a time.
class SampleOrder {
 public:
  // Training: sources are blended by weight, each through its epochs without end. single_pass:
  // every sample of every source once, source after source, weights ignored. start: global index of
  // the first sample. skip: indices that are left out, in any order. DataError if a source has too
  // few tokens: seq_len + 1 for training, 2 for a single pass.
  SampleOrder(std::vector<BatchSource> sources, const PackOptions& options, bool single_pass,
              int64_t start, std::vector<int64_t> skip);

  // The next sample; id is -1 when a single pass is over.
  SampleRef next();
  // Global index from which next() looks for a sample.
  int64_t position() const { return position_; }
  // Samples of a single pass; -1 if there is no end.
  int64_t num_samples() const { return num_samples_; }

  // The order of one epoch. Two epochs per source are kept; the reference is good until others are
  // asked for. Building one takes about 0.1 us per document.
  const EpochOrder& epoch_order(int64_t source, int64_t epoch);
  const TokenDataset& dataset(int64_t source) const { return *sources_[source].dataset; }

 private:
  struct CachedEpoch {
    int64_t epoch = -1;
    std::unique_ptr<EpochOrder> order;
  };

  std::vector<BatchSource> sources_;
  PackOptions options_;
  bool single_pass_;
  int64_t position_;
  std::vector<int64_t> skip_;  // sorted
  Blend blend_;                // training
  std::vector<int64_t> ends_;  // single pass: index after each source
  int64_t num_samples_ = -1;
  std::vector<std::array<CachedEpoch, 2>> epochs_;  // per source, by the parity of the epoch
};

}  // namespace dstrain
