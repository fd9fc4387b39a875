// The memory of the engine: what its tensors take is measured first, with micro-batches that
// compute nothing, and all of it is taken at once.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "core/engine/train_engine.h"

namespace dstrain {
namespace {

class NullStream : public Stream {
 public:
  void* native() const override { return nullptr; }
  void synchronize() override {}
};

constexpr int64_t kSums = 6;
constexpr int64_t kMasterChunk = int64_t{1} << 22, kCopyChunk = int64_t{1} << 24;  // elements

}  // namespace

int64_t TrainEngine::memory_bytes() const {
  int64_t bytes = 0;
  for (const MemoryOwner& owner : memory_) bytes += owner.bytes;
  return bytes;
}

int64_t TrainEngine::host_memory_bytes() const {
  int64_t bytes = 0;
  for (const MemoryOwner& owner : memory_)
    if (backend_.is_cpu() || owner.kind == MemoryKind::host) bytes += owner.bytes;
  return bytes;
}

// The fixed tensors of the run by owner. Runs twice: on measuring arenas, and on real ones.
void TrainEngine::for_each_owner(const OwnerVisitor& visit) {
  for (Chunk& chunk : chunks_) chunk.store->make_memory(visit);
  visit("batch and constants", MemoryKind::device, [this](Arena& a) {
    for (BatchSlot& batch : batches_) batch.make_device(a);
    for (Chunk& chunk : chunks_)
      chunk.model->make_constants(backend_, *stream_, a, options_.seq_len, options_.dtype);
    make_sums(a);
    make_master_chunk(a);
  });
  if (options_.training && options_.dtype == DType::bf16)
    visit("checkpoint copies", MemoryKind::device, [this](Arena& a) {
      const int64_t elements = std::min(kCopyChunk, largest_parameter());
      copy_chunks_2N_ = a.make(DType::f32, {2, elements}, "master values");
    });
  visit("host staging", MemoryKind::host, [this](Arena& a) {
    for (BatchSlot& batch : batches_) batch.make_host(a);
    host_inputs_ = a.make(DType::u8, {2, static_cast<int64_t>(sizeof(StepInputs))}, "step inputs");
    host_zeros_ = a.make(DType::u8, {zeroed_.numel()}, "zeros");
    host_results_2X_ = a.make(DType::u8, {2, read_back_.numel()}, "results");
    host_evaluation_1_ = a.make(DType::f64, {1}, "evaluation loss");
  });
}

// Everything that is read back after a step lies together, and of it all that is zeroed before one.
void TrainEngine::make_sums(Arena& arena) {
  const DeepSeekModel& model = *chunks_[0].model;
  const int64_t L = model.num_moe_layers(), E = model.config().n_routed_experts;
  const int64_t scalars = static_cast<int64_t>(sizeof(StepScalars)), counts = L * E * 8;
  read_back_ = arena.make(DType::u8, {scalars + kSums * 8 + counts}, "sums");
  char* at = static_cast<char*>(read_back_.raw());
  scalars_ = reinterpret_cast<StepScalars*>(at);
  zeroed_ = read_back_.rows(scalars, read_back_.numel());
  sums_6_ = Tensor(at + scalars, DType::f64, {kSums});
  sums_.loss_1 = sums_6_.rows(0, 1);
  sums_.mtp_1 = sums_6_.rows(1, 2);
  sums_.balance_1 = sums_6_.rows(2, 3);
  norm_1_ = sums_6_.rows(5, 6);
  sums_.counts_LE = Tensor(at + scalars + kSums * 8, DType::i64, {L, E});
  evaluation_1_ = arena.make(DType::f64, {1}, "evaluation loss");
  token_loss_T_ =
      arena.make(stat_dtype(options_.dtype), {batches_[0].batch().num_tokens()}, "token losses");
}

int64_t TrainEngine::largest_parameter() {
  int64_t largest = 0;
  for (Chunk& chunk : chunks_)
    for (const Parameter& p : chunk.model->parameters().all())
      largest = std::max(largest, p.numel());
  return largest;
}

void TrainEngine::make_master_chunk(Arena& arena) {
  if (options_.dtype != DType::bf16) return;
  const int64_t elements = std::min(kMasterChunk, largest_parameter());
  master_chunk_N_ = arena.make(DType::f32, {elements}, "master values");
  low_chunk_N_ = arena.make(DType::u16, {elements}, "lower halves");
}

void TrainEngine::plan() {
  auto add = [&](const std::string& name, int64_t bytes, MemoryKind kind = MemoryKind::device) {
    for (MemoryOwner& owner : memory_)
      if (owner.name == name) return void(owner.bytes += bytes);
    memory_.push_back({name, bytes, kind});
  };
  for_each_owner([&](const char* name, MemoryKind kind, const std::function<void(Arena&)>& make) {
    Arena arena(name);
    make(arena);
    planned_.push_back(arena.peak());
    add(name, arena.peak(), kind);
  });
  dry_run();
  for (const Chunk& chunk : chunks_)
    for (const Slot& slot : chunk.slots) add("activations", slot.arena.peak());
  add("scratch", scratch_.peak());
  add("workspace", backend_.workspace_bytes());
}

// Micro-batches without arithmetic, one of training and one of evaluation: the arenas' peaks are
// the plan.
void TrainEngine::dry_run() {
  NullStream stream;
  batches_[0].assume_largest();
  for (size_t i = 0; i < chunks_.size(); ++i)
    run_micro_batch_dry(i, backend_.planning_ops(), stream);
}

void TrainEngine::run_micro_batch_dry(size_t index, Ops& ops, Stream& stream) {
  Chunk& chunk = chunks_[index];
  const Batch& batch = batches_[0].batch();
  const auto number = static_cast<int>(index);
  for (int64_t m = 0; m < std::ssize(chunk.slots); ++m) {
    Slot& slot = slot_of(number, m);
    receive_buffer(number, m, /*gradient=*/false);
    StepContext evaluation = context(ops, stream, chunk, slot, batch, Pass::evaluation);
    evaluation.dry = true;
    chunk.model->forward(evaluation, slot.state, slot.x_in_tD);
    if (!options_.training) continue;
    receive_buffer(number, m, /*gradient=*/false);
    StepContext training = context(ops, stream, chunk, slot, batch, Pass::training);
    training.dry = true;
    chunk.model->forward(training, slot.state, slot.x_in_tD);
    if (options_.split_backward) {
      chunk.model->backward_input(training, slot.state, slot.dx_out_tD, slot.dx_in_tD);
      chunk.model->backward_weight(training, slot.state);
    } else {
      chunk.model->backward(training, slot.state, slot.dx_out_tD, slot.dx_in_tD);
    }
  }
}

void TrainEngine::allocate() {
  backend_.prepare(*stream_);
  auto take = [&](const char* name, MemoryKind kind, int64_t bytes) {
    blocks_.emplace_back(backend_, std::max<int64_t>(bytes, Arena::kAlignment), kind);
    return Arena(name, blocks_.back().data(), bytes);
  };
  size_t index = 0;
  for_each_owner([&](const char* name, MemoryKind kind, const std::function<void(Arena&)>& make) {
    Arena arena = take(name, kind, planned_.at(index++));
    make(arena);
  });
  for (Chunk& chunk : chunks_)
    for (Slot& slot : chunk.slots)
      slot.arena = take("activations", MemoryKind::device, slot.arena.peak());
  scratch_ = take("scratch", MemoryKind::device, scratch_.peak());
  for (BatchSlot& batch : batches_) batch.prepare(backend_);
  std::memset(host_zeros_.raw(), 0, static_cast<size_t>(host_zeros_.bytes()));
  for (int64_t i = 0; i < 2; ++i)
    free_.push_back({0, host_results_2X_.rows(i, i + 1), backend_.make_event()});
  set_progress(0, 0);
}

}  // namespace dstrain
