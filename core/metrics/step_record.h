// What a run reports while it goes: one record a step, one an evaluation, one a checkpoint.
// Losses are in nats per token, times in the unit of the name. Plain values, filled by the trainer.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/metrics/exposed_record.h"

namespace dstrain {

// Balance of the routed experts in one step, over all tokens of the global batch. "Load" is a
// layer's busiest expert over the layer's mean (1 = even); an expert is dead if no token chose it.
struct ExpertLoad {
  double max_over_mean_worst = 0;    // worst layer
  double max_over_mean_average = 0;  // mean over layers
  int64_t dead_worst = 0;            // worst layer
  double dead_average = 0;           // mean over layers
  double balance_loss = 0;           // unweighted sequence balance loss, mean over layers
};

// Where the time of a step went, in milliseconds: on a GPU the GPU's, but for what the host waits.
struct StepPhases {
  double data_ms = 0;  // the host waited for the reader; a GPU computes meanwhile
  double forward_backward_ms = 0;
  double optimizer_ms = 0;         // what is left of sums over ranks, norm, clip, update
  double checkpoint_stall_ms = 0;  // held up by a save
};

// Bytes that one rank sent to other ranks for one phase of summing gradients. The baseline is what
// the same phase in fp32, over all ranks of the group at once, would have sent.
struct TrafficRecord {
  int64_t sent = 0, baseline = 0;
  int64_t sent_between_nodes = 0, baseline_between_nodes = 0;  // parts of the above
  double ms = 0;  // compression included: of the host on a CPU, of the stream that sends on a GPU
};

// The first rank's traffic of gradients.
struct GradientTraffic {
  TrafficRecord reduce_scatter, all_gather;
};

struct StepRecord {
  int64_t step = 0;   // 1 is the first
  int64_t steps = 0;  // planned for the whole run
  double loss = 0;
  std::optional<double> mtp_loss;
  double grad_norm = 0;  // before clipping
  double lr = 0;
  int64_t tokens = 0;        // in this step
  int64_t total_tokens = 0;  // since the run began, over resumes
  double tokens_per_s = 0;
  double step_ms = 0;                 // of the device, without what lies between steps
  std::optional<ExpertLoad> experts;  // absent without routed experts
  bool skipped = false;               // gradient not finite: nothing was updated
  int64_t skipped_total = 0;
  StepPhases phases;
  std::optional<GradientTraffic> traffic;  // absent with one rank
  std::optional<ExposedRecord> exposed;    // of the first rank; likewise
  std::optional<double> gflops_per_s;
  std::optional<double> mfu;  // share of the device's peak, 0 to 1
};

struct EvalRecord {
  int64_t step = 0;
  std::string set;  // name of the held-out set
  double loss = 0;
  double perplexity = 0;
  std::optional<double> bits_per_byte;  // absent where the bytes behind the tokens are not known
  int64_t tokens = 0;
  double seconds = 0;
};

struct CheckpointRecord {
  int64_t step = 0;
  double seconds = 0;  // from snapshot to commit
  int64_t bytes = 0;
  bool ok = true;
  double stall_ms = 0;  // how long training waited
  std::string error;    // why, if not ok
};

}  // namespace dstrain
