// Engine and generator on memory that the host cannot reach, with copies that arrive late: the bits
// of a CPU run.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <deque>

#include "core/backend/cpu_backend.h"
#include "core/checkpoint/state_boxes.h"
#include "core/checkpoint/state_copy.h"
#include "core/engine/generator.h"
#include "core/engine/parameter_io.h"
#include "test/support/catch.h"
#include "test/support/far_backend.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

struct Trained {
  std::vector<double> sums;  // of the steps
  std::vector<int64_t> counts;
  std::vector<std::vector<float>> state;
  std::vector<double> token_loss;
  std::vector<float> logits;
  double evaluation = 0;
  bool operator==(const Trained&) const = default;
};

void note(Trained& out, const StepResult& result) {
  out.sums.insert(out.sums.end(),
                  {result.loss, result.mtp_loss, result.balance_loss, result.grad_norm});
  out.counts.insert(out.counts.end(), result.expert_counts_LE.begin(),
                    result.expert_counts_LE.end());
}

int64_t synchronizations(TrainEngine& engine) {
  const auto* far = dynamic_cast<const FarStream*>(&engine.stream());
  return far ? far->synchronizations() : 0;
}

// Three micro-batches a step, through two places for inputs; results are taken `late` steps later.
// The host's batch is overwritten as soon as it was loaded.
Trained train(Backend& backend, const ModelConfig& model, Recompute recompute, int64_t late) {
  const auto batches_of = [&](uint64_t seed) {
    return TinyBatch(model, {.seed = seed, .sequences = 6, .packed = true, .ignored = 0.2})
        .split(2);
  };
  EngineOptions options = tiny_options(batches_of(1), DType::f32, recompute);
  options.loaded_batches = 2;
  options.optimizer.grad_clip = 0.5;
  TrainEngine engine(backend, model, options);
  engine.allocate();
  engine.initialize(3);
  Trained out;
  const int64_t waits = synchronizations(engine);
  for (uint64_t step = 0; step < 4; ++step) {
    std::vector<TinyBatch> batches = batches_of(20 + step);
    int64_t valid = 0;
    for (const TinyBatch& batch : batches) valid += batch.valid_tokens();
    engine.begin_step(0.01, valid);
    for (size_t m = 0; m < batches.size(); ++m) {
      const int64_t number = static_cast<int64_t>(m);
      engine.load(number, batches[m].host(), m + 1 == batches.size());
      std::ranges::fill(batches[m].tokens, 0);
      std::ranges::fill(batches[m].targets, 0);
      engine.forward(0, number);
      engine.backward(0, number);
    }
    engine.finish_step();
    while (engine.results_outstanding() > late) note(out, engine.take_result());
  }
  while (engine.results_outstanding() > 0) note(out, engine.take_result());
  CHECK(synchronizations(engine) == waits);  // only events are waited for

  const TinyBatch batch = batches_of(5)[0];
  out.token_loss.resize(batch.tokens.size());
  out.evaluation = engine.evaluate(batch.host(), out.token_loss.data());
  engine.logits(batch.host(), 0, 3, out.logits);
  for (const StateSlice& slice : engine.saved_state())
    out.state.push_back(read_slice(backend, engine.stream(), slice));
  return out;
}

std::vector<float> generate(Backend& backend, const ModelConfig& model) {
  EngineOptions options;
  options.training = false;
  options.seq_len = 90;
  TrainEngine engine(backend, model, options);
  engine.allocate();
  engine.initialize(3);
  Generator generator(backend, engine.model(), options.seq_len, options.dtype);
  std::vector<int32_t> prompt(70);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<int32_t>(i * 7 % 30);
  std::vector<float> logits = generator.feed(prompt);
  for (const int32_t token : {3, 8, 1}) {
    const std::vector<float>& next = generator.feed({&token, 1});
    logits.insert(logits.end(), next.begin(), next.end());
  }
  return logits;
}

// A step on three micro-batches; `between` runs where gradients are there and the update is not.
template <class Between>
void take_step(TrainEngine& engine, const ModelConfig& model, uint64_t seed, Between between) {
  const std::vector<TinyBatch> batches =
      TinyBatch(model, {.seed = seed, .sequences = 6, .packed = true}).split(2);
  int64_t valid = 0;
  for (const TinyBatch& batch : batches) valid += batch.valid_tokens();
  engine.begin_step(0.01, valid);
  for (size_t m = 0; m < batches.size(); ++m)
    engine.accumulate(batches[m].host(), m + 1 == batches.size());
  engine.reduce_gradients();
  between();
  engine.finish_step();
  engine.take_result();
}

// How many tensors of a copy that runs beside a step are not as they were when it was queued.
size_t changed_in_copy(bool held) {
  ModelConfig model = tiny_moe();
  model.bias_update_speed = 0.01;
  FarBackend far;
  TrainEngine engine(far, model, tiny_options(TinyBatch(model, {.sequences = 6}).split(2)));
  engine.allocate();
  engine.initialize(3);
  take_step(engine, model, 1, [] {});

  std::vector<std::vector<float>> before, copies;
  for (const StateSlice& slice : engine.saved_state())
    before.push_back(read_slice(far, engine.stream(), slice));
  const std::vector<StateTensor> tensors = state_tensors(engine.saved_state());
  std::vector<void*> places;
  for (const StateTensor& tensor : tensors) {
    copies.emplace_back(static_cast<size_t>(tensor.bytes()) / sizeof(float));
    places.push_back(copies.back().data());
  }
  StateCopy copy(far, engine.copy_chunks_2N());
  engine.begin_state_copy(copy.stream());
  Event& copied = copy.queue(tensors, places);
  if (held) engine.hold_state(copied);
  // The copies go on while gradients are computed.
  take_step(engine, model, 2, [&] { CHECK(copies != before); });
  if (held) CHECK(copies == before);
  copied.synchronize();
  size_t changed = 0;
  for (size_t i = 0; i < copies.size(); ++i) changed += copies[i] != before[i];
  return changed;
}

}  // namespace

TEST_CASE("far memory: a run whose host reaches no device memory has the bits of a CPU run",
          "[engine]") {
  const ModelConfig model = GENERATE(tiny_moe(), tiny_v2(), tiny_dense(), tiny_mtp());
  const Recompute recompute = GENERATE(Recompute::none, Recompute::full);
  CAPTURE(model.n_routed_experts, static_cast<int>(recompute));
  const auto cpu = make_cpu_backend(1);
  FarBackend far;
  const Trained expected = train(*cpu, model, recompute, 0);
  CHECK((train(far, model, recompute, 1) == expected));
}

TEST_CASE("far memory: a copy of the state runs beside a step, whose update waits for it",
          "[engine][checkpoint]") {
  CHECK(changed_in_copy(true) == 0);
  CHECK(changed_in_copy(false) > 0);  // what the test is able to see
}

TEST_CASE("far memory: generated text has the logits of a CPU run", "[engine]") {
  const ModelConfig model = GENERATE(tiny_moe(), tiny_dense());
  const auto cpu = make_cpu_backend(1);
  FarBackend far;
  CHECK(generate(far, model) == generate(*cpu, model));
}

TEST_CASE("far memory: early reads, early writes and direct access are found", "[engine]") {
  FarBackend far;
  const auto stream = far.make_stream();
  const DeviceMemory device(far, 8, MemoryKind::device);
  const float value = 1.5f;
  float copy = 0;
  far.copy(*stream, device.data(), &value, sizeof value);
  far.copy(*stream, &copy, device.data(), sizeof copy);
  CHECK(copy != value);
  stream->synchronize();
  CHECK(copy == value);

  float staging = 2.0f;
  far.copy(*stream, device.data(), &staging, sizeof staging);
  staging = 3.0f;
  CHECK_THROWS_WITH(stream->synchronize(), Catch::Contains("changed while it was copied"));

  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::signal(SIGSEGV, SIG_DFL);
    ::_exit(*static_cast<volatile char*>(device.data()) == 0 ? 1 : 2);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status));
}

}  // namespace dstrain::test
