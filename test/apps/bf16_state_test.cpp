// Checkpoints of runs whose parameters are bf16 with f32 master values: the same tensors as those
// of an f32 run, so that a run goes on at any type. What a step would do is made up, since a CPU
// computes no step in bf16.
#include <algorithm>
#include <cstring>
#include <map>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "core/backend/cpu_backend.h"
#include "core/base/bf16.h"
#include "core/base/file.h"
#include "core/base/rng.h"
#include "core/checkpoint/async_saver.h"
#include "core/checkpoint/state_copy.h"
#include "core/config/config_io.h"
#include "core/engine/parameter_io.h"
#include "test/support/temp_folder.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

using State = std::map<std::string, std::vector<float>>;

struct Types {
  DType values = DType::f32, moments = DType::f32;
};
constexpr Types kWide{}, kNarrow{DType::bf16, DType::f32}, kNarrowest{DType::bf16, DType::bf16},
    kNarrowMoments{DType::f32, DType::bf16};

class Run {
 public:
  explicit Run(const Types& types, bool training = true)
      : engine_(*backend_, tiny_moe(), options_of(types, training)) {
    engine_.allocate();
    engine_.initialize(3);
  }

  // Random state, of `seed` alone; moments of as many bits as their type has.
  void train(uint64_t seed) {
    for (const StateSlice& slice : engine_.loaded_state()) {
      std::vector<float> values(static_cast<size_t>(slice.end - slice.begin));
      const std::string name = slice.kind + slice.parameter->spec.name;
      for (size_t i = 0; i < values.size(); ++i)
        values[i] = static_cast<float>(
            random_normal(seed, stream_id(name.data(), name.size()), static_cast<uint64_t>(i)));
      write_slice(*backend_, engine_.stream(), values, slice);
    }
  }

  std::string save(const std::string& folder) {
    CheckpointStore store(folder, 2);
    const std::vector<StateTensor> tensors = state_tensors(engine_);
    const DeviceMemory snapshot(*backend_, AsyncSaver::snapshot_bytes(tensors), MemoryKind::host);
    CheckpointMeta meta;
    meta.step = 7;
    Config config;
    config.model = tiny_moe();
    meta.config_yaml = dump_config(config);
    StateCopy copy(*backend_, engine_.copy_chunks_2N());
    AsyncSaver saver(
        store,
        std::span(static_cast<std::byte*>(snapshot.data()), static_cast<size_t>(snapshot.bytes())),
        [&](std::span<const StateTensor> state, std::span<void* const> places) {
          Event& copied = copy.queue(state, places);
          return [&copied] { copied.synchronize(); };
        });
    saver.request(meta, tensors);
    saver.wait();
    const std::optional<SaveResult> result = saver.poll();
    REQUIRE(result.has_value());
    INFO(result->error);
    REQUIRE(result->ok);
    return result->path;
  }

  void load(const std::string& checkpoint, bool with_optimizer = true) {
    CheckpointReader reader(checkpoint);
    load_state(engine_, reader, with_optimizer);
  }

  State state() {
    State state;
    for (const StateSlice& slice : engine_.loaded_state())
      state[slice.kind + "." + slice.parameter->spec.name] =
          read_slice(*backend_, engine_.stream(), slice);
    return state;
  }

 private:
  static EngineOptions options_of(const Types& types, bool training) {
    EngineOptions options;
    options.dtype = types.values;
    options.moments = types.moments;
    options.training = training;
    options.seq_len = 8;
    return options;
  }

  std::unique_ptr<Backend> backend_ = make_cpu_backend(1);
  TrainEngine engine_;
};

// The states are the same but for moments of `b`, which are rounded to bf16.
bool same_but_moments(const State& a, const State& b) {
  return a.size() == b.size() && std::ranges::all_of(a, [&](const auto& entry) {
           std::vector<float> values = entry.second;
           if (!entry.first.starts_with("param."))
             for (float& value : values) value = bf16_to_f32(f32_to_bf16(value));
           return values == b.at(entry.first);
         });
}

}  // namespace

TEST_CASE("bf16 state: a run goes on at its own types with every bit", "[checkpoint]") {
  const TempFolder folder;
  for (const Types& types : {kWide, kNarrow, kNarrowest, kNarrowMoments}) {
    CAPTURE(dtype_name(types.values), dtype_name(types.moments));
    Run run(types), resumed(types);
    run.train(1);
    resumed.load(run.save(folder / dtype_name(types.values)));
    CHECK(resumed.state() == run.state());
  }
}

TEST_CASE("bf16 state: a checkpoint holds f32 master values, and moments in their type",
          "[checkpoint]") {
  const TempFolder folder;
  Run run(kNarrowest);
  run.train(1);
  const CheckpointReader reader(run.save(folder.path()));
  for (const ManifestTensor& tensor : reader.manifest().tensors) {
    CAPTURE(tensor.name);
    CHECK(tensor.dtype == (tensor.name.starts_with("param.") ? DType::f32 : DType::bf16));
  }
}

TEST_CASE("bf16 state: a run goes on at other types, master values stay exact", "[checkpoint]") {
  const TempFolder folder;
  Run wide(kWide), narrow(kNarrow), narrowest(kNarrowest);
  wide.train(2);
  narrow.load(wide.save(folder / "wide"));
  CHECK(narrow.state() == wide.state());
  Run back(kWide);
  back.load(narrow.save(folder / "narrow"));
  CHECK(back.state() == wide.state());

  narrowest.load(folder / "wide/step-00000007");
  CHECK(same_but_moments(wide.state(), narrowest.state()));
  back.load(narrowest.save(folder / "narrowest"));
  CHECK(back.state() == narrowest.state());
  narrow.load(folder / "narrowest/step-00000007");
  CHECK(narrow.state() == narrowest.state());
}

TEST_CASE("bf16 state: who evaluates has the values that the run computed with", "[checkpoint]") {
  const TempFolder folder;
  Run run(kNarrow), evaluation(kNarrow, /*training=*/false);
  run.train(3);
  evaluation.load(run.save(folder.path()), /*with_optimizer=*/false);
  const State masters = run.state();
  for (const auto& [name, values] : evaluation.state()) {
    const bool buffer = !masters.contains("adamw.exp_avg." + name.substr(6));
    CAPTURE(name);
    std::vector<float> wanted = masters.at(name);
    if (!buffer)
      for (float& value : wanted) value = bf16_to_f32(split_master(value).high);
    CHECK(values == wanted);
  }
}

TEST_CASE("bf16 state: an export has the master values", "[checkpoint]") {
  const TempFolder folder;
  Run wide(kWide), narrow(kNarrow);
  for (const auto& [run, name] : {std::pair{&wide, "wide"}, {&narrow, "narrow"}}) {
    run->train(4);
    const std::string checkpoint = run->save(folder / name);
    REQUIRE(cmd_export({checkpoint, folder / (std::string(name) + "-hf"), "fp32", false}) == 0);
  }
  constexpr int64_t kMost = int64_t{1} << 30;
  CHECK(read_small_file(folder / "narrow-hf/model.safetensors", kMost) ==
        read_small_file(folder / "wide-hf/model.safetensors", kMost));
}

}  // namespace dstrain::test
