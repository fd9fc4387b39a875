// One rank's trainer minus its loop: memory, the parts of the model that are here, micro-batches, update.
// Everything large is planned by a dry run of the same code on measuring arenas, then allocated once.
//
// A step is begin_step, then for each micro-batch load, and forward and backward of each chunk in the order
// of a pipeline schedule, then finish_step, whose result is read when the device has it:
//
//   engine.begin_step(lr, valid_tokens);
//   for each micro-batch m:  load(m, batch, last);  forward(0, m);  backward(0, m);
//   engine.finish_step();  ...  StepResult result = engine.take_result();
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "core/backend/backend.h"
#include "core/dist/local.h"
#include "core/engine/batch_slot.h"
#include "core/model/model.h"
#include "core/optim/adamw.h"

namespace dstrain {

// A run of layers on this rank, with as many micro-batches between their forward and the end of their
// backward as the schedule needs. Micro-batches of a chunk end in the order in which they began.
struct EngineChunk {
  int64_t first_layer = 0;
  int64_t last_layer = -1;  // exclusive; -1 means all
  int in_flight = 1;
};

struct EngineOptions {
  DType dtype = DType::f32;    // of activations and parameters
  DType moments = DType::f32;  // of f32 and bf16 parameters; or bf16
  int64_t micro_batch = 1;   // sequences
  int64_t seq_len = 1;
  int64_t global_batch = 1;  // sequences of an optimizer step, over all ranks
  Recompute recompute = Recompute::none;
  bool training = true;      // false: no gradients, no optimizer state
  OptimizerConfig optimizer;
  std::vector<EngineChunk> chunks = {{}};
  int loaded_batches = 1;       // micro-batches whose inputs are here at once
  bool split_backward = false;  // backward_input and backward_weight apart
};

// What a step was, summed over all ranks and read back from the device.
struct StepResult {
  double loss = 0;       // mean over the valid tokens of the global batch
  double mtp_loss = 0;   // likewise, mean over prediction modules
  double balance_loss = 0;
  double grad_norm = 0;  // before clipping
  bool finite = true;    // false: nothing was updated
  int64_t updates = 0;   // applied so far
  int64_t ranks_leaving = 0, ranks_saving = 0;  // see request()
  std::vector<int64_t> expert_counts_LE;
};

struct MemoryOwner {
  std::string name;
  int64_t bytes = 0;
  MemoryKind kind = MemoryKind::device;
};

enum class Pass { training, evaluation };

// Thread-compatible; one engine drives one stream.
class TrainEngine {
 public:
  // Plans; allocates nothing large. The distribution outlives the engine; without one there is one rank.
  TrainEngine(Backend& backend, const ModelConfig& model, const EngineOptions& options,
              Distribution* distribution = nullptr);

  const std::vector<MemoryOwner>& memory() const { return memory_; }
  int64_t memory_bytes() const;
  int64_t host_memory_bytes() const;  // what of it takes the host's memory: all on a CPU
  void allocate();
  void initialize(uint64_t seed);

  // --- a step
  void begin_step(double lr, int64_t valid_tokens);
  // The inputs of micro-batch m = 0, 1, ... of the step; `batch` may change when this returns.
  void load(int64_t m, const HostBatch& batch, bool last_of_step = true);
  // x_in_tD: what the previous chunk sent (absent on the first). Returns what goes to the next chunk, absent
  // on the last; it stays until the micro-batch's backward here has run, in an evaluation until the slot
  // is needed again.
  Tensor forward(int chunk, int64_t m, const Tensor& x_in_tD = {}, Pass pass = Pass::training);
  // dx_out_tD: the gradient of what went on. Returns the gradient of x_in_tD, absent on the first chunk; it
  // stays until the slot's next forward.
  Tensor backward(int chunk, int64_t m, const Tensor& dx_out_tD = {});
  // The same in two parts, where options.split_backward is set.
  Tensor backward_input(int chunk, int64_t m, const Tensor& dx_out_tD = {});
  void backward_weight(int chunk, int64_t m);
  // load, forward and backward of one micro-batch, where there is one chunk.
  void accumulate(const HostBatch& batch, bool last_of_step = true);
  // Where the next chunk's rank receives into: room for what a chunk is sent, by forward and backward.
  Tensor receive_buffer(int chunk, int64_t m, bool gradient);

  // The gradients of the step, summed over ranks, without update; finish_step() may follow.
  void reduce_gradients();
  // Asks all ranks, with the result of this step, to leave after it, or to save: the sums carry it.
  void request(bool leave, bool save);
  // Queues reduction, norm, clipping, update and the read-back of the sums.
  void finish_step();
  // The result of the oldest finished step that was not taken; waits for the device. At most two may be
  // outstanding.
  StepResult take_result();
  int64_t results_outstanding() const { return std::ssize(pending_); }

  // --- evaluation. Changes nothing that a step reads, also between its micro-batches.
  void begin_evaluation();
  // Sum of token losses over all ranks since begin_evaluation(); every rank calls it.
  double finish_evaluation();
  // One micro-batch, where there is one chunk; token_loss_T (host, T, may be null) receives each token's.
  double evaluate(const HostBatch& batch, double* token_loss_T = nullptr);
  // Forward without loss, then logits of rows [begin, end) into host memory as float [rows, vocab]. One chunk,
  // whole vocabulary.
  void logits(const HostBatch& batch, int64_t begin, int64_t end, std::vector<float>& out);

  Backend& backend() { return backend_; }
  Stream& stream() { return *stream_; }
  int num_chunks() const { return static_cast<int>(chunks_.size()); }
  DeepSeekModel& model(int chunk = 0) { return *chunks_[static_cast<size_t>(chunk)].model; }
  ParamStore& store(int chunk = 0) { return *chunks_[static_cast<size_t>(chunk)].store; }
  ParameterSet& parameters(int chunk = 0) { return model(chunk).parameters(); }
  const EngineOptions& options() const { return options_; }
  Distribution& distribution() { return distribution_; }
  DistStream dist_stream() { return {backend_.ops(), *stream_, false}; }
  // Of all chunks; see ParamStore.
  std::vector<StateSlice> saved_state() const;
  std::vector<StateSlice> loaded_state() const;
  // Copies of saved_state() beside the next step, between steps. What is queued on `copies` from now on finds
  // the state that the last step leaves.
  void begin_state_copy(Stream& copies);
  // `copied` is recorded behind those copies and outlives the next step, which waits for it on the device
  // before it changes what they read. Calls that load or initialize do not wait.
  void hold_state(Event& copied);
  // f32 device memory that master values in two halves pass on their way into a copy, two chunks of it; absent
  // where there are none.
  const Tensor& copy_chunks_2N() const { return copy_chunks_2N_; }
  // Sees every routing from now on; may be null.
  void set_routing_hook(RoutingHook* hook) { routing_hook_ = hook; }

  // Updates applied so far: skipped steps do not count. Part of the checkpoint; the last one of the results
  // taken.
  int64_t updates() const { return updates_; }
  // Where a run starts: steps done, skipped ones counted, and updates applied.
  void set_progress(int64_t steps, int64_t updates);

 private:
  struct Slot {
    explicit Slot(MicroBatchState s) : arena("activations"), state(std::move(s)) {}
    Arena arena;
    MicroBatchState state;
    int64_t micro_batch = -1;  // in flight
    Tensor x_in_tD, dx_out_tD, dx_in_tD;
  };
  struct Chunk {
    std::unique_ptr<DeepSeekModel> model;
    std::unique_ptr<ParamStore> store;
    std::unique_ptr<DistContext> context;
    std::vector<Slot> slots;
    std::vector<int> blocks;  // that have trainable parameters, ascending
    bool first = false, last = false;
  };
  struct Pending {
    int64_t valid_tokens = 0;
    Tensor host;
    std::unique_ptr<Event> ready;
  };

  void make_chunks(const ModelConfig& model);
  void for_each_owner(const OwnerVisitor& visit);
  void make_sums(Arena& arena);
  int64_t largest_parameter();
  void make_master_chunk(Arena& arena);
  void initialize_slice(const StateSlice& slice, uint64_t seed);
  void plan();
  void dry_run();
  void run_micro_batch_dry(size_t chunk, Ops& ops, Stream& stream);
  Chunk& chunk_at(int chunk) { return chunks_.at(static_cast<size_t>(chunk)); }
  Slot& slot_of(int chunk, int64_t m);
  BatchSlot& batch_of(int64_t m) { return batches_[static_cast<size_t>(m) % batches_.size()]; }
  StepContext context(Ops& ops, Stream& stream, Chunk& chunk, Slot& slot, const Batch& batch, Pass pass);
  StepContext context(Chunk& chunk, Slot& slot, int64_t m, Pass pass);
  Slot& begin_backward(int chunk, int64_t m, const Tensor& dx_out_tD);
  void sum_results();
  void update_parameters(Chunk& chunk);

  Backend& backend_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Event> state_is_ready_;
  Event* state_is_copied_ = nullptr;  // what the next update waits for
  EngineOptions options_;
  LocalDistribution one_rank_;
  Distribution& distribution_;
  std::vector<Chunk> chunks_;
  std::vector<BatchSlot> batches_;
  std::vector<bool> batch_is_last_;
  AdamW adamw_;
  RoutingHook* routing_hook_ = nullptr;
  int64_t updates_ = 0;
  int64_t valid_tokens_ = 0;
  bool reduced_ = false;
  int64_t steps_begun_ = 0;  // over resumes

  std::vector<MemoryOwner> memory_;
  std::vector<int64_t> planned_;  // bytes, in the order of for_each_owner
  std::vector<DeviceMemory> blocks_;
  Arena scratch_;

  StepScalars* scalars_ = nullptr;
  StepSums sums_;
  // Loss, prediction loss, balance loss, ranks that leave, ranks that save, squares of gradients.
  Tensor sums_6_, norm_1_, zeroed_, read_back_;
  Tensor evaluation_1_;  // f64; apart from the sums, so that a step may be under way
  Tensor token_loss_T_;
  Tensor master_chunk_N_, low_chunk_N_, copy_chunks_2N_;  // where parameters are bf16
  Tensor host_inputs_, host_zeros_, host_results_2X_, host_evaluation_1_;
  std::deque<Pending> pending_;
  std::vector<Pending> free_;
};

}  // namespace dstrain
