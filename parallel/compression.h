// Sums of gradients in which each rank sends a part of its gradient, and keeps what it did not send
// in a residual for the next step (error feedback; Karimireddy et al. 2019, arXiv:1901.09847).
//
// Each piece of a range is compressed on its own and goes to its owner alone, by one all-to-all;
// the owner adds what it reads in ascending rank order. With error feedback its own piece need not
// be compressed: the sum begins with all of it. Without, it is cut like the others. Payloads have a
// fixed size (core/backend/compressed_format.h). A gathered sum is compressed once more, by the
// owner, with a residual of its own; all ranks, the owner included, read the same payload.
//
// NaN and infinity are sent. Where the step is then skipped, all residuals are cleared: they hold
// parts of a gradient that is thrown away, and what they held before is not kept.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "core/backend/compressed_format.h"
#include "parallel/dense_reducer.h"
#include "parallel/grad_reducer.h"
#include "parallel/residual_state.h"

namespace dstrain {

// The method of a job, with its format.
class GradCodec {
 public:
  explicit GradCodec(const CompressionConfig& config);

  int64_t payload_bytes(int64_t elements) const;  // of a piece
  bool lossless() const;
  void compress(DistStream, const Tensor& grad_PN, const Tensor& residual_PN,
                const Tensor& payload_PB) const;
  void sum(DistStream, const Tensor& payload_PB, Accumulate accumulate, const Tensor& sum_N) const;

 private:
  std::variant<TopkFormat, Int8Format> format_;
};

class CompressedReducer : public GradReducer {
 public:
  // config.method is topk or int8; config.scope does not matter here. `elsewhere`: ranks of the
  // communicator on other nodes. A collective call of its ranks, which connect for exchanges.
  CompressedReducer(const CompressionConfig& config, Communicator& comm, int elsewhere,
                    const ParameterSet& parameters, std::vector<PieceLayout> ranges, bool gathers);

  void make_memory(const OwnerVisitor& visit) override;
  void clear(DistStream dist) override;
  void begin_step(int64_t step) override { dense_ = step < dense_steps_; }
  void reduce_scatter(DistStream dist, int range, const Tensor& whole,
                      const Tensor& shard) override;
  void all_gather(DistStream dist, int range, const Tensor& shard, const Tensor& whole) override;
  void end_step(DistStream dist, const StepScalars* scalars) override;
  std::vector<StateSlice> saved() const override;
  std::vector<StateSlice> loaded(const SavedKinds& kinds) const override;
  GradTraffic traffic() const override { return traffic_; }

 private:
  struct Range {
    PieceLayout layout;
    int64_t residual_begin = 0;      // in residuals_: a piece per rank
    int64_t sum_residual_begin = 0;  // in sum_residuals_: this rank's piece
    // Nothing is left over of the piece that this rank owns, but a checkpoint can bring something.
    bool own_residual_is_zero = false;
  };

  Range& range_at(int range, const Tensor& whole, const Tensor& shard);
  void sum_all(DistStream dist, const Tensor& whole_RN, const Tensor& sum_N);
  void sum_with_residuals(DistStream dist, Range& range, const Tensor& whole_RN,
                          const Tensor& sum_N);
  // sum = what this rank has of its own piece.
  void take_own(DistStream dist, Range& range, const Tensor& own_N, const Tensor& sum_N);
  Tensor residual_of(const Range& range) const;      // [ranks, shard], or absent
  Tensor sum_residual_of(const Range& range) const;  // [1, shard], or absent
  std::vector<ResidualRange> residual_ranges() const;

  const GradCodec codec_;
  Communicator& comm_;
  const TrafficMeter meter_;
  const ParameterSet& parameters_;
  const bool gathers_, keeps_residuals_;
  const int64_t dense_steps_;
  bool dense_ = false;

  std::vector<Range> ranges_;
  // Of all-to-alls of one row per rank: with and without this rank's.
  std::vector<int64_t> row_offsets_, other_offsets_;
  int64_t payload_bytes_ = 0;         // of the largest piece
  int64_t residual_elements_ = 0, sum_residual_elements_ = 0;
  Tensor residuals_, sum_residuals_;  // f32
  Tensor sent_, received_;            // u8, a payload per rank
  GradTraffic traffic_;
};

}  // namespace dstrain
