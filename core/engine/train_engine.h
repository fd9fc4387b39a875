// A complete single-rank trainer minus its loop: memory, model, micro-batches, update. Everything large
// is planned by a dry run of the same code on measuring arenas, then allocated once.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/backend/backend.h"
#include "core/dist/local.h"
#include "core/model/model.h"
#include "core/optim/adamw.h"

namespace dstrain {

// A micro-batch in host memory. T = sequences * tokens_per_sequence.
struct HostBatch {
  int64_t sequences = 0, tokens_per_sequence = 0;
  const int32_t* tokens_T = nullptr;
  const int32_t* positions_T = nullptr;
  const int32_t* targets_T = nullptr;  // below 0: ignored; null: no loss
  // Attention segments: rows [offsets[i], offsets[i + 1]), all within a sequence.
  const int32_t* segment_offsets = nullptr;
  int64_t num_segments = 0;
};

struct EngineOptions {
  DType dtype = DType::f32;      // of activations, and of parameters on a CPU
  int64_t micro_batch = 1;       // sequences
  int64_t seq_len = 1;
  int64_t global_batch = 1;      // sequences of an optimizer step
  Recompute recompute = Recompute::none;
  bool training = true;          // false: no gradients, no optimizer state
  OptimizerConfig optimizer;
};

// What a step was, read back from the device.
struct StepResult {
  double loss = 0;       // mean over the valid tokens of the global batch
  double mtp_loss = 0;   // likewise, mean over prediction modules
  double balance_loss = 0;
  double grad_norm = 0;  // before clipping
  bool finite = true;    // false: nothing was updated
  std::vector<int64_t> expert_counts_LE;
};

struct MemoryOwner {
  std::string name;
  int64_t bytes = 0;
};

// Thread-compatible; one engine drives one stream.
class TrainEngine {
 public:
  // Plans; allocates nothing large.
  TrainEngine(Backend& backend, const ModelConfig& model, const EngineOptions& options);

  const std::vector<MemoryOwner>& memory() const { return memory_; }
  int64_t memory_bytes() const;
  void allocate();
  void initialize(uint64_t seed);

  // One optimizer step: begin, one or more micro-batches, finish.
  void begin_step(double lr, int64_t valid_tokens);
  void accumulate(const HostBatch& batch);
  StepResult finish_step();
  // The gradients of the step so far, with parameters no micro-batch touched set to zero; without update.
  void finish_gradients();

  // Sum of token losses; token_loss_T (host, T, may be null) receives each token's. Changes nothing
  // that a step reads, also between its micro-batches.
  double evaluate(const HostBatch& batch, double* token_loss_T = nullptr);
  // Forward without loss, then logits of rows [begin, end) into host memory as float [rows, vocab].
  void logits(const HostBatch& batch, int64_t begin, int64_t end, std::vector<float>& out);

  Backend& backend() { return backend_; }
  Stream& stream() { return *stream_; }
  DeepSeekModel& model() { return model_; }
  ParameterSet& parameters() { return model_.parameters(); }
  const EngineOptions& options() const { return options_; }
  // Flat moments with the parameters' offsets; absent without training.
  const Tensor& exp_avg() const { return exp_avg_; }
  const Tensor& exp_avg_sq() const { return exp_avg_sq_; }
  LocalDist& dist() { return dist_; }
  // Updates applied so far: skipped steps do not count. Part of the checkpoint.
  int64_t updates() const { return updates_; }
  void set_updates(int64_t updates) { updates_ = updates; }

 private:
  using MakeTensors = std::function<void(Arena&)>;
  void for_each_owner(const std::function<void(const char*, MemoryKind, MakeTensors)>& visit);
  void make_sums(Arena& arena);
  void plan();
  void bind();
  void dry_run();
  StepContext context(Ops& ops, Stream& stream, bool training);
  void set_targets(bool present);
  void stage_targets(const HostBatch& batch);
  void upload(const HostBatch& batch);
  StepResult read_result();
  template <class F>
  void read_floats(const Tensor& x, F* out);

  Backend& backend_;
  std::unique_ptr<Stream> stream_;
  EngineOptions options_;
  DeepSeekModel model_;
  LocalDist dist_;
  DistContext dist_context_;
  int64_t updates_ = 0;
  int64_t valid_tokens_ = 0;

  std::vector<MemoryOwner> memory_;
  std::vector<DeviceMemory> blocks_;
  Arena slot_, scratch_;
  MicroBatchState state_;

  Tensor values_, grads_, exp_avg_, exp_avg_sq_, buffers_;
  Tensor norm_1_, token_loss_T_;
  Tensor evaluation_1_;  // f64; apart from the sums, so that a step may be under way
  StepScalars* scalars_ = nullptr;
  StepSums sums_;
  Tensor sums_memory_;
  Batch batch_;
  std::vector<Tensor> target_memory_;
  // Host staging of one micro-batch: segment table, targets.
  Tensor host_table_N4_, host_targets_KT_, host_sums_;
  std::unique_ptr<AdamW> adamw_;
};

}  // namespace dstrain
