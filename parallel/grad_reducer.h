// Sums of gradients over the ranks that hold copies of the same elements, one flat range at a time.
// ParamStore decides when a range is summed and what becomes of the result; the reducer decides
// what travels:
//   DenseReducer         all elements, by the Communicator
//   HierarchicalReducer  inside the nodes first, then between them
//   Bf16Reducer          either of the two, with elements rounded to bf16
//   CompressedReducer    top-k or int8 with error feedback (parallel/compression.h)
//
// A whole range has ranks * shard elements; rank r of the communicator owns elements [r * shard, (r
// + 1) * shard), its shard. Elements at and after the last parameter are padding and zero.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/config/parallel_config.h"
#include "core/dist/communicator.h"
#include "core/dist/param_store.h"

namespace dstrain {

// Element i of the whole is element begin + i of the flat trainable range of a ParameterSet; those
// at and after `end` are padding. end - begin <= ranks * shard.
struct GradRange {
  int64_t begin = 0, end = 0;
  int64_t shard = 0;
};

// The ranks that sum gradients with each other, and how they lie on nodes. Communicators outlive
// the reducer.
struct ReduceRanks {
  Communicator* all = nullptr;
  int nodes = 1;
  int elsewhere = 0;  // ranks on other nodes than this one
  // Where there are several nodes with equally many ranks, more than one and consecutive: the ranks
  // of this node, and the ranks with the same place on their nodes. Null otherwise.
  Communicator* intra = nullptr;
  Communicator* inter = nullptr;
};

// The same with the communicators that it was split into.
struct NodeSplit {
  ReduceRanks ranks;
  std::unique_ptr<Communicator> intra, inter;
};
// `node` names the machine of this rank. Every rank of `all` calls it, outside of steps. Without
// `two_levels` there are no communicators for them.
NodeSplit split_by_node(Communicator& all, const std::string& node, bool two_levels = true);
// Whether make_grad_reducer() may be asked for sums in two levels, where method auto may choose
// any: nothing else needs the communicators.
bool may_sum_in_two_levels(const CompressionConfig& compression, bool hierarchical);

// Bytes that this rank sent to other ranks. The baseline is what an fp32 reduce-scatter (or
// all-gather) over all ranks of the group at once would have sent.
struct PhaseTraffic {
  int64_t sent = 0, baseline = 0;
  int64_t sent_between_nodes = 0, baseline_between_nodes = 0;  // parts of the above
  double seconds = 0;  // of the calls: parallel/reduce_times.h
  PhaseTraffic& operator+=(const PhaseTraffic& other);
};
struct GradTraffic {
  PhaseTraffic reduce, gather;
  GradTraffic& operator+=(const GradTraffic& other);
};
// "reduce-scatter 1.2 MiB sent, 5.0% of 24.0 MiB in fp32 at once; all-gather ...": phases without
// calls are left out; where there are several nodes, the part between them follows.
std::string describe(const GradTraffic& traffic);

// The kinds of state that a checkpoint holds of a parameter, in any order.
using SavedKinds = std::function<std::vector<std::string>(const Parameter&)>;

// Thread-compatible. Calls are asynchronous on the stream, which is always the same one; every rank
// makes the same calls in the same order. In a dry run nothing is sent.
class GradReducer {
 public:
  virtual ~GradReducer() = default;

  // All memory of the reducer, by owner; run on measuring arenas first, then on real ones. Then
  // clear().
  virtual void make_memory(const OwnerVisitor& visit) = 0;
  // Residuals become zero.
  virtual void clear(DistStream) {}

  // `step`: optimizer steps that the run has done, over resumes.
  virtual void begin_step(int64_t step) = 0;
  // shard = this rank's part of the sum of `whole` over ranks. shard may be its own place in whole;
  // what else whole holds afterwards is undefined. May be called several times per range and step
  // (micro-batches).
  virtual void reduce_scatter(DistStream, int range, const Tensor& whole, const Tensor& shard) = 0;
  // whole = the shards in rank order, the same bits on every rank. For sums that every rank needs
  // (ZeRO-0), not for parameters: it may lose what a residual then keeps. shard may be its own
  // place in whole. Needs `gathers` in make_grad_reducer.
  virtual void all_gather(DistStream, int range, const Tensor& shard, const Tensor& whole) = 0;
  // After clip_scale has written `scalars` (device memory): where the step is skipped, residuals
  // are cleared, since they hold parts of the gradient that is thrown away.
  virtual void end_step(DistStream, const StepScalars* scalars) = 0;

  // --- checkpoints: residuals, in the units of the summed gradient, by kinds that say whose they
  // are (parallel/residual_state.h); copies of tied parameters have kinds of their own. Over all
  // ranks of the job each element of each kind is there once.
  virtual std::vector<StateSlice> saved() const { return {}; }
  // What to read after clear(), in this order. With as many ranks as saved, each gets its own
  // residuals back; otherwise the owner of an element gets the sum over all.
  virtual std::vector<StateSlice> loaded(const SavedKinds&) const { return {}; }

  // Since the start.
  virtual GradTraffic traffic() const = 0;
};

struct GradReducerOptions {
  CompressionConfig compression;
  bool hierarchical = false;  // where the nodes allow it; compressing all traffic does without
  bool gathers = false;       // all_gather will be called
  DType dtype = DType::f32;   // of gradients; compression and rounding take f32 only
  bool rounds = false;        // gradients travel in bf16; not together with compression
};

// Whether a method that compresses makes a difference: there are other ranks, on other nodes where
// only traffic between nodes is compressed.
bool can_compress(const CompressionConfig& compression, const ReduceRanks& ranks);

// `parameters` has its layout, outlives the reducer, and names what residuals belong to. A range is
// named by its number in `ranges`. The method is one that is named, not auto
// (parallel/auto_compression.h). ConfigError if compression between nodes is wanted and the nodes
// differ in size.
std::unique_ptr<GradReducer> make_grad_reducer(const GradReducerOptions& options,
                                               const ReduceRanks& ranks,
                                               const ParameterSet& parameters,
                                               std::vector<GradRange> ranges);

}  // namespace dstrain
