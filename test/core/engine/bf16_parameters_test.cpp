// Parameters in bf16 with f32 master values, on a CPU, which holds and converts them but cannot
// compute with them.
#include <cstring>
#include <map>

#include "core/backend/cpu_backend.h"
#include "core/base/bf16.h"
#include "core/engine/parameter_io.h"
#include "core/engine/precision.h"
#include "core/engine/train_engine.h"
#include "test/support/catch.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

EngineOptions options_of(DType dtype, bool training = true, DType moments = DType::f32) {
  EngineOptions options;
  options.dtype = dtype;
  options.moments = moments;
  options.training = training;
  options.seq_len = 16;
  return options;
}

std::map<std::string, std::vector<float>> parameters_of(TrainEngine& engine) {
  std::map<std::string, std::vector<float>> values;
  for (const StateSlice& slice : engine.loaded_state())
    if (slice.kind == "param")
      values[slice.parameter->spec.name] = read_slice(engine.backend(), engine.stream(), slice);
  return values;
}

int64_t bytes_of(const TrainEngine& engine, const std::string& name) {
  for (const MemoryOwner& owner : engine.memory())
    if (owner.name == name) return owner.bytes;
  return -1;
}

}  // namespace

TEST_CASE("bf16 parameters: master values start as the parameters of an f32 run do, bit for bit",
          "[engine]") {
  const auto backend = make_cpu_backend(2);
  TrainEngine wide(*backend, tiny_moe(), options_of(DType::f32));
  TrainEngine narrow(*backend, tiny_moe(), options_of(DType::bf16));
  TrainEngine values(*backend, tiny_moe(), options_of(DType::bf16, false));
  for (TrainEngine* engine : {&wide, &narrow, &values}) {
    engine->allocate();
    engine->initialize(5);
  }
  CHECK(parameters_of(narrow) == parameters_of(wide));
  // Without training there are the upper halves alone, the same ones.
  for (const Parameter& p : narrow.parameters().all()) {
    const Parameter& q = *values.parameters().find(p.spec.name);
    CAPTURE(p.spec.name);
    CHECK(p.value.dtype() == (p.spec.trainable ? DType::bf16 : DType::f32));
    CHECK(std::memcmp(p.value.raw(), q.value.raw(), static_cast<size_t>(p.value.bytes())) == 0);
  }
}

TEST_CASE("bf16 parameters: a master value is written and read as one float", "[engine]") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  Parameter p;
  p.spec.name = "w";
  std::vector<uint16_t> high(3), low(3);
  const Tensor data(high.data(), DType::bf16, {3});
  const std::vector<float> values = {0.1f, -0.0f, 1.00390625f};  // the last is a tie of bf16
  const StateSlice master{"param", &p, 0, 3, data, false, Tensor(low.data(), DType::u16, {3})};
  write_slice(*backend, *stream, values, master);
  CHECK(read_slice(*backend, *stream, master) == values);
  CHECK(high[2] == 0x3f81);
  const std::vector<uint16_t> with_low = high;
  write_slice(*backend, *stream, values, {"param", &p, 0, 3, data});
  CHECK(high == with_low);
  // Moments are plain bf16: ties go to even.
  write_slice(*backend, *stream, values, {"adamw.exp_avg", &p, 0, 3, data});
  CHECK(high[2] == 0x3f80);
}

TEST_CASE("bf16 parameters: memory by type", "[engine]") {
  const auto backend = make_cpu_backend(1);
  const TrainEngine f32_moments(*backend, tiny_dense(), options_of(DType::bf16));
  const TrainEngine moments(*backend, tiny_dense(), options_of(DType::bf16, true, DType::bf16));
  const TrainEngine mixed(*backend, tiny_dense(), options_of(DType::f32, true, DType::bf16));
  const TrainEngine values(*backend, tiny_dense(), options_of(DType::bf16, false));
  TrainEngine wide(*backend, tiny_dense(), options_of(DType::f32));
  const int64_t N = wide.parameters().trainable_elements();
  REQUIRE(2 * N % Arena::kAlignment == 0);
  for (const TrainEngine* engine : {&f32_moments, &moments, &values})
    CHECK(bytes_of(*engine, "parameters") == 2 * N);
  CHECK(bytes_of(moments, "gradients") == 4 * N);
  CHECK(bytes_of(f32_moments, "optimizer state") == 2 * N + 8 * N);
  CHECK(bytes_of(moments, "optimizer state") == 2 * N + 4 * N);
  CHECK(bytes_of(mixed, "parameters") == 4 * N);
  CHECK(bytes_of(mixed, "optimizer state") == 4 * N);
  CHECK(bytes_of(values, "optimizer state") == -1);
}

TEST_CASE("bf16 parameters: what precision asks for, by back end", "[engine][config]") {
  const auto cpu = make_cpu_backend(1);
  const auto set = [&](ComputeType compute, MomentType moments) {
    PrecisionConfig precision;
    precision.compute = compute;
    precision.moments = moments;
    EngineOptions options;
    set_precision(precision, *cpu, options);
    return options;
  };
  CHECK(set(ComputeType::automatic, MomentType::fp32).dtype == DType::f32);
  CHECK(set(ComputeType::fp32, MomentType::fp32).dtype == DType::f32);
  CHECK_THROWS_WITH(set(ComputeType::bf16, MomentType::fp32),
                    "precision.compute: bf16 needs a GPU; on a CPU write fp32 or auto");
  CHECK_THROWS_WITH(set(ComputeType::tf32, MomentType::fp32), Catch::Contains("tf32 needs a GPU"));
  CHECK_THROWS_WITH(set(ComputeType::fp32, MomentType::bf16),
                    "precision.moments: bf16 needs a GPU; on a CPU write fp32");
}

}  // namespace dstrain::test
