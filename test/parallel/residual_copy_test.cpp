// Copies of residuals beside the next step: they see what the last step left on the store's own
// stream, and the next sums wait for them.
#include "core/backend/cpu_backend.h"
#include "core/checkpoint/state_boxes.h"
#include "core/checkpoint/state_copy.h"
#include "parallel/param_shards.h"
#include "test/support/catch.h"
#include "test/support/late_backend.h"
#include "test/support/reducer_rank.h"

namespace dstrain::test {
namespace {

// Counts in its residual, one element for each parameter: 1 for a sum over ranks, 10 for one that
// is gathered, 1000 for the end of a step. Of one rank, whose sums are what it has.
class CountingReducer : public GradReducer {
 public:
  explicit CountingReducer(const ParameterSet& parameters) : parameters_(parameters) {}
  void make_memory(const OwnerVisitor& visit) override {
    visit("residual", MemoryKind::device,
          [this](Arena& a) { residual_ = a.make(DType::f32, {1}, "residual"); });
  }
  void clear(DistStream dist) override { count(dist, -count_); }
  void begin_step(int64_t) override {}
  void reduce_scatter(DistStream dist, int, const Tensor&, const Tensor&) override {
    count(dist, 1);
  }
  void all_gather(DistStream dist, int, const Tensor&, const Tensor&) override { count(dist, 10); }
  void end_step(DistStream dist, const StepScalars*) override { count(dist, 1000); }
  std::vector<StateSlice> saved() const override {
    return {{"residual.0of1", parameters_.find("bias"), 0, 1, residual_}};
  }
  GradTraffic traffic() const override { return {}; }

 private:
  void count(DistStream dist, int more) {
    count_ += more;
    dist.ops.fill(dist.stream, residual_, count_);
  }
  const ParameterSet& parameters_;
  Tensor residual_;
  int count_ = 0;
};

struct CopiedResidual {
  float copy = -1, next = -1;  // the copy's, and the residual after the step beside it
};

// A step, a copy, and another step beside the copy. Whatever is queued on streams of the store's or
// of the copy's runs when somebody waits for it.
struct Use {
  bool sees_last_step = true, is_held = true;
  bool is_early = false;  // the copy, which runs before the step
};
CopiedResidual copy_beside_step(const ZeroOptions& zero, const Use& use) {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  LateBackend late(*backend, *stream);
  LocalCommunicator world(late);
  const DistStream dist{late.ops(), *stream};
  ParameterSet parameters;
  declare_some(parameters);
  ShardRanks ranks;
  for (Communicator*& group : ranks.groups) group = &world;
  ExposedTime exposed(late, /*measures=*/false);
  ParamShards store(late, parameters, {DType::f32}, zero, ranks,
                    [](ReduceGroup, const ParameterSet& set, const std::vector<GradRange>&) {
                      return std::make_unique<CountingReducer>(set);
                    },
                    exposed);
  std::vector<DeviceMemory> memory;
  const auto make_memory = [&](const char* owner, MemoryKind kind, const auto& make) {
    Arena measuring(owner);
    make(measuring);
    memory.emplace_back(late, measuring.peak(), kind);
    Arena arena(owner, memory.back().data(), measuring.peak());
    make(arena);
  };
  store.make_memory(make_memory);
  store.clear(dist);

  const auto step = [&](int64_t number) {
    store.begin_step(number);
    store.begin_micro_batch(true);
    for (const int block : {1, 0}) {
      const AcquiredBlock values(store, dist, block);
      for (const Parameter& p : parameters.all())
        if (p.spec.block == block) dist.ops.fill(dist.stream, store.grad(p).grad, 1.0);
      store.grads_ready(dist, block);
    }
    store.reduce_gradients(dist);
    for (const int block : {0, 1}) store.publish(dist, block);
    store.end_step(dist, nullptr);
  };
  step(0);
  CopiedResidual out;
  StateCopy copy(late, {});
  if (use.sees_last_step) store.begin_state_copy({late.ops(), copy.stream()});
  for (const StateTensor& tensor : state_tensors(store.saved())) {
    if (!tensor.name.starts_with("residual.")) continue;
    void* const place = &out.copy;
    Event& copied = copy.queue({&tensor, 1}, {&place, 1});
    if (use.is_held) store.hold_state(copied);
    if (use.is_early) copied.synchronize();
    step(1);
    copied.synchronize();
    StateCopy after(late, {});
    void* const last = &out.next;
    store.begin_state_copy({late.ops(), after.stream()});
    after.queue({&tensor, 1}, {&last, 1}).synchronize();
    return out;
  }
  return out;
}

}  // namespace

TEST_CASE("residual copy: it is of the step before, and the sums of the next wait for it",
          "[ranks][checkpoint]") {
  const ZeroOptions zero = GENERATE(ZeroOptions{0}, ZeroOptions{1}, ZeroOptions{2}, ZeroOptions{3},
                                    ZeroOptions{2, true}, ZeroOptions{3, true});
  CAPTURE(zero.stage, zero.keep_full_grads);
  const CopiedResidual right = copy_beside_step(zero, {});
  CHECK(right.copy > 1000);
  CHECK(right.copy < 2000);
  CHECK(right.next == 2 * right.copy);
  CHECK(copy_beside_step(zero, {.is_early = true}).copy == right.copy);
  // What the test is able to see: a copy before the last step has ended, and one after the next
  // sums.
  CHECK(copy_beside_step(zero, {.sees_last_step = false, .is_early = true}).copy < right.copy);
  CHECK(copy_beside_step(zero, {.is_held = false}).copy > right.copy);
}

}  // namespace dstrain::test
