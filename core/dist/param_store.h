// Values, gradients and optimizer state of the parameters of one model part: where they lie, which of
// them this rank holds, and how gradients are summed over ranks (ZeRO: Rajbhandari et al. 2020,
// arXiv:1910.02054). Layers see values and gradients block by block; the optimizer sees flat ranges.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "core/backend/ops.h"
#include "core/dist/parameter.h"
#include "core/tensor/arena.h"

namespace dstrain {

// Where a layer's call queues its work. In a dry run nothing is computed or sent.
struct DistStream {
  Ops& ops;
  Stream& stream;
  bool dry = false;
};

// Where a parameter gradient goes. A look at every contribution (per-example norms, compression) belongs
// here.
struct GradTarget {
  Tensor grad;
  Accumulate accumulate = Accumulate::add;
};

// A flat run of elements that this rank updates; the tensors are parallel.
struct OptimizerRange {
  int block = 0;
  bool weight_decay = false;
  Tensor value, grad, exp_avg, exp_avg_sq;
  Tensor value_low = {};  // u16, where values are bf16: the rest of the master value (Ops::adamw)
};

// Elements [begin, end) of a parameter's local tensor, row-major, as a checkpoint holds them.
struct StateSlice {
  std::string kind;  // "param", "adamw.exp_avg", "adamw.exp_avg_sq", ...
  const Parameter* parameter = nullptr;
  int64_t begin = 0, end = 0;
  Tensor data;  // flat, end - begin elements
  bool add = false;  // reading adds to what data holds, instead of replacing it
  // u16, parallel to bf16 data: the rest of master values (Ops::adamw). A checkpoint holds these as f32. bf16
  // parameters without it are rounded copies, which are read and never saved.
  Tensor low = {};
};

// Calls `make` on an arena that measures, or on one that has memory.
using OwnerVisitor =
    std::function<void(const char* owner, MemoryKind kind, const std::function<void(Arena&)>& make)>;

struct ParamStoreOptions {
  DType dtype = DType::f32;    // of values; gradients and buffers are stat_dtype(dtype)
  bool training = true;        // false: values only; true: bf16 values are halves of f32 master values
  DType moments = DType::f32;  // or bf16; those of f64 values are f64

  bool has_low() const { return training && dtype == DType::bf16; }
  DType moment_dtype() const { return dtype == DType::f64 ? dtype : moments; }
};

// Calls of a step: begin_step, then for each micro-batch of this part begin_micro_batch and, from its
// layers, acquire, release, grad and grads_ready; then reduce_gradients, add_norm, block by block the
// update of ranges() and publish, end_step.
class ParamStore {
 public:
  virtual ~ParamStore() = default;

  // --- set-up: all memory of the store, by owner; run on measuring arenas first, then on real ones.
  virtual void make_memory(const OwnerVisitor& visit) = 0;
  // Zeroes values, gradients and optimizer state, padding included. What loaded() names is to be filled
  // after it.
  virtual void clear(DistStream) = 0;

  // --- layers. Between acquire_finish and release the values of a block are whole and their addresses
  // (Parameter::value) hold; acquires of one block nest. start prefetches; it may be left out.
  virtual void acquire_start(DistStream, int block) = 0;
  virtual void acquire_finish(DistStream, int block) = 0;
  virtual void release(DistStream, int block) = 0;
  // The place to put (or add) a contribution to the gradient; every call is one contribution.
  virtual GradTarget grad(const Parameter& parameter) = 0;
  // No contribution to this block's gradients follows in this micro-batch.
  virtual void grads_ready(DistStream, int block) = 0;

  // --- step
  // `step`: optimizer steps that the run has done, over resumes.
  virtual void begin_step(int64_t step) = 0;
  virtual void begin_micro_batch(bool last_of_step) = 0;
  // After it, the gradients of ranges() are sums over all ranks and micro-batches; where no contribution
  // was made they are zero.
  virtual void reduce_gradients(DistStream) = 0;
  // sum_1 (f64) += squares of gradients; summed over all ranks of the job each element counts once.
  virtual void add_norm(DistStream, const Tensor& sum_1) = 0;
  // In ascending order of blocks.
  virtual std::span<const OptimizerRange> ranges() const = 0;
  // For each block of the part, in ascending order, behind the update of its ranges: every rank gets the values
  // that it needs, while later blocks are updated.
  virtual void publish(DistStream, int block) = 0;
  // Last: scalars (device memory) say whether the step was skipped.
  virtual void end_step(DistStream, const StepScalars*) {}

  // --- checkpoints. Over all ranks, saved() holds each element once; loaded() is what this rank has to fill.
  virtual std::vector<StateSlice> saved() const = 0;
  virtual std::vector<StateSlice> loaded() const = 0;
  // Copies beside the next step, between steps. What is queued on copies.stream from now on finds what
  // end_step has left, as far as that was queued on streams of the store's own.
  virtual void begin_state_copy(DistStream /*copies*/) {}
  // What of saved() changes before the update of ranges() waits on the device for `copied`, which outlives the
  // next step. The update is held back by the caller.
  virtual void hold_state(Event& /*copied*/) {}
};

// The values of a block, from here to the end of the scope.
class AcquiredBlock {
 public:
  AcquiredBlock(ParamStore& store, DistStream dist, int block) : store_(store), dist_(dist), block_(block) {
    store_.acquire_finish(dist_, block_);
  }
  ~AcquiredBlock() { store_.release(dist_, block_); }
  AcquiredBlock(const AcquiredBlock&) = delete;
  AcquiredBlock& operator=(const AcquiredBlock&) = delete;

 private:
  ParamStore& store_;
  DistStream dist_;
  int block_;
};

}  // namespace dstrain
