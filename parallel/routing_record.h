// The routing of a run, by step, layer, sequence and position: recorded by one run and replayed by
// another of the same batches, whatever the layouts. Comparisons of layouts need it: rounding may
// flip the choice between two experts of equal score, which is no fault but changes everything
// after it.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "core/config/config.h"
#include "core/config/layout.h"
#include "core/dist/place.h"
#include "core/layers/step_context.h"

namespace dstrain {

// Shared by the ranks of a run in one process; thread-safe.
class RoutingRecord {
 public:
  RoutingRecord(int64_t global_batch, int64_t sequence_length, int64_t experts_per_token)
      : sequences_(global_batch), length_(sequence_length), choices_(experts_per_token) {}
  int64_t choices() const { return choices_; }
  // K expert indices of one token, written and read by many threads, but each token by one at a
  // time.
  int32_t* token(int64_t step, int moe_index, int64_t sequence, int64_t position);

 private:
  int64_t sequences_, length_, choices_;
  std::mutex mutex_;  // over the map, whose elements stay where they are
  std::map<std::pair<int64_t, int>, std::vector<int32_t>> layers_;
};

// What a replay found: how many tokens would have chosen otherwise, and the widest margin of such a
// choice (parallel/routing_margin.h).
struct RoutingFlips {
  int64_t tokens = 0;
  double widest_margin = 0;
};

// Records, or replays, on one rank. It waits for the device in every MoE layer. The back end
// outlives it.
class RoutingTap : public RoutingHook {
 public:
  RoutingTap(const Config& config, const RankPlace& place, RoutingRecord& record, bool replay,
             Backend& backend);
  void begin_step(int64_t step) { step_ = step; }
  const RoutingFlips& flips() const { return flips_; }

  void begin_micro_batch(int64_t m) override { micro_batch_ = m; }
  Tensor recorded(DistStream, int moe_index, int64_t tokens) override;
  void chosen(DistStream, int moe_index, const Tensor& scores_tE, const Tensor& bias_E,
              const Tensor& indices_tK) override;

 private:
  // Of this rank's row t of the micro-batch under way.
  int32_t* token(int moe_index, int64_t t, int64_t tokens) const;
  template <class T>
  std::vector<T> download(Stream& stream, const Tensor& x) const;

  Config config_;
  RankPlace place_;
  RoutingRecord& record_;
  bool replay_;
  int64_t step_ = 0, micro_batch_ = 0;
  Backend& backend_;
  // By micro-batch and layer, while in flight: recorded choices on the device.
  std::map<std::pair<int64_t, int>, DeviceMemory> rows_;
  RoutingFlips flips_;
};

}  // namespace dstrain
