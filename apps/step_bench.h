// Times whole training steps on random tokens: what `bench step` prints.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "apps/ceilings.h"
#include "apps/rank_environment.h"
#include "core/backend/timed_ops.h"
#include "core/config/config.h"
#include "core/config/layout.h"
#include "core/engine/batch_slot.h"
#include "core/metrics/exposed_record.h"

namespace dstrain {

struct StepBenchOptions {
  int64_t steps = 10, warm_up = 2;
  int64_t documents = 1;       // of a sequence, of random lengths
  int64_t profiled_steps = 0;  // further steps, whose operations are timed one by one
};

struct StepBenchResult {
  std::vector<double> step_seconds;  // sorted
  double startup_seconds = 0;        // from the start of the process to the first step's result
  double host_seconds = 0;           // that a step keeps the host busy; on a CPU the whole step
  double flops = 0;                  // of a step, over all ranks
  double loss = 0;                   // of the last step
  int64_t plan_bytes = 0;            // all that this rank allocates
  int64_t ranks = 1;
  MeshShape mesh;
  std::optional<ExposedRecord> exposed;           // of a step, the mean; with several ranks
  int64_t private_before = 0, private_after = 0;  // memory of this process, in bytes
  bool on_gpu = false;
  std::string device, precision, recompute;
  std::map<std::string, OpTotal> profile;  // of a step: the median of those profiled
  Ceilings ceilings;                       // of the device; with a profile only
};

// A collective call of all ranks of the job. Each gets its own times, of which those of a step are
// the same but for a little, since ranks wait for each other.
StepBenchResult bench_step(const Config& config, const StepBenchOptions& options,
                           const JobRanks& ranks = {});

// A micro-batch of random tokens, in so many documents a sequence; the same for the same index.
struct SyntheticBatch {
  SyntheticBatch(const Config& config, uint64_t index, int64_t documents = 1);
  std::vector<int32_t> tokens, targets, positions, offsets;
  HostBatch batch;
};

}  // namespace dstrain
