// A rank that trains as the trainer does (apps/trainer.h), without files: results are taken a step
// late, a copy of the state runs beside the second of three steps, an evaluation follows it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/checkpoint/state_copy.h"
#include "core/config/config.h"
#include "core/config/layout.h"
#include "parallel/random_sequences.h"
#include "parallel/rank_job.h"

namespace dstrain::test {

struct TrainerRun {
  std::vector<StepResult> steps;
  double evaluation = 0;                    // sum of token losses
  std::vector<std::vector<char>> snapshot;  // of this rank's saved state after the first step
};

class TrainerRank {
 public:
  // All outlive it.
  TrainerRank(const Config& config, const MeshShape& shape, Communicator& ranks, Backend& backend,
              const std::string& node);
  TrainerRun run();

 private:
  // The micro-batches of global batch `number`: run(count, load).
  template <class Run>
  void micro_batches(int64_t number, const Run& run);
  void queue_step(int64_t number);
  double evaluate();
  void copy_state(std::vector<std::vector<char>>& snapshot);

  const Config& config_;
  Backend& backend_;
  RankJob job_;
  RandomSequences sequences_;
  std::optional<StateCopy> state_copy_;
  Event* copied_ = nullptr;
};

}  // namespace dstrain::test
