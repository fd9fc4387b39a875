// Parameters and made-up gradients without a model, for tests of stores that several ranks share:
// the calls of a training step as layers and engines make them, and what must come out of it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "core/config/layout.h"
#include "parallel/mesh.h"
#include "parallel/param_shards.h"
#include "test/support/rank_threads.h"

namespace dstrain::test {

enum class CallOrder {
  plain,  // forward, backward
  ahead,  // the next micro-batch's forward comes before a backward
  split,  // weight gradients of all blocks come after the rest of the backward
};
enum class ShardFault { none, norm_counted_twice, replicated_not_summed, tied_updated_twice };

struct ShardJob {
  MeshShape shape = {};  // one or two pipeline stages
  int zero = 1;
  bool keep_full_grads = false;
  int micro_batches = 1;
  bool tied = false;  // the table of block 0 is also the head
  CallOrder order = CallOrder::plain;
  // Gradients are small multiples of 1/8, so that sums are exact in any order; otherwise they are
  // random.
  bool exact = true;
  double clip = 3.0;
  // Of values. bf16 ones are halves of master values, which are to be those of an f32 run, bit for
  // bit.
  DType dtype = DType::f32;
  CompressionConfig compression = {};  // where it loses something, nothing is compared
  bool rounds = false;  // gradients travel in bf16, where exact ones stay what they are
  ShardFault fault = ShardFault::none;
};

// The state of a job, whole: by kind and name, in the order of the global tensor.
using GlobalState = std::map<std::string, std::vector<float>>;
struct JobState {
  GlobalState tensors;
  double sum_squares = 0;  // of the last step's gradients
};

// The initial state, which does not depend on the job but for its tie.
GlobalState initial_state(bool tied);

// A run of steps by LocalParamStore, with sums in the order that the job's ZeRO stage has: over
// ranks, or over micro-batches first.
struct ReferenceRun {
  int first_step = 0;
  std::vector<JobState> states;  // before the first step, and after each
};
ReferenceRun run_reference(const ShardJob& job, int steps, const GlobalState& start,
                           int first_step = 0);

// The same steps by ranks that share the parameters. Checks values whenever they are acquired,
// norms, and the state at the end, which each element must be in once; throws RuntimeFailure that
// names what is wrong. `at_end` runs on each rank.
using AtEnd = std::function<void(RankContext&, ParamShards&)>;
class JobRun {
 public:
  JobRun(const ShardJob& job, const ReferenceRun& reference, AtEnd at_end = {});
  void run_rank(RankContext& rank);  // on the thread of each rank
  GlobalState finish();              // after all of them

 private:
  const ShardJob job_;
  const ReferenceRun& reference_;
  const AtEnd at_end_;
  std::mutex mutex_;
  GlobalState state_, times_;
};
// All of it, on rank threads.
GlobalState run_shard_job(const ShardJob& job, const ReferenceRun& reference,
                          const AtEnd& at_end = {});

// Declares the parameters of one rank.
void declare_shard_job(ParameterSet& parameters, const ShardJob& job, const RankPlace& place);
inline constexpr int kShardJobHead = 5;

// One rank's store, with memory.
class ShardRank {
 public:
  ShardRank(const ShardJob& job, RankContext& rank);
  ProcessMesh& mesh() { return mesh_; }
  ParameterSet& parameters() { return parameters_; }
  ParamShards& store() { return store_; }
  const std::map<std::string, int64_t>& planned() const { return planned_; }  // bytes by owner

 private:
  ProcessMesh mesh_;
  ParameterSet parameters_;
  ExposedTime exposed_;
  ParamShards store_;
  std::map<std::string, int64_t> planned_;
  std::vector<DeviceMemory> memory_;
};

}  // namespace dstrain::test
