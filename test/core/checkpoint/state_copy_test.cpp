// The way of bf16 parameters with their lower halves into a snapshot, and of bf16 tensors out of a
// checkpoint.
#include "core/checkpoint/state_copy.h"

#include "core/backend/cpu_backend.h"
#include "core/base/bf16.h"
#include "core/base/error.h"
#include "core/checkpoint/state_boxes.h"
#include "test/core/checkpoint/checkpoint_fixture.h"
#include "test/support/late_backend.h"

namespace dstrain {
namespace {

using Catch::Contains;
using checkpoint_test::ScratchFolder;
using test::LateBackend;

// Parameter "w" of 4 x 5 elements and its master values in two halves.
struct Master {
  Master() {
    parameter.spec.name = "w";
    parameter.spec.shape = parameter.local_shape = {4, 5};
    parameter.local_begin = {0, 0};
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = 1.0f / static_cast<float>(i + 3) - 0.2f;
      const MasterHalves halves = split_master(values[i]);
      high.push_back(halves.high);
      low.push_back(halves.low);
    }
  }
  StateSlice slice(int64_t begin, int64_t end) {
    return {"param",
            &parameter,
            begin,
            end,
            Tensor(high.data() + begin, DType::bf16, {end - begin}),
            false,
            Tensor(low.data() + begin, DType::u16, {end - begin})};
  }

  Parameter parameter;
  std::vector<float> values = std::vector<float>(20);
  std::vector<uint16_t> high, low;
};

}  // namespace

TEST_CASE("state copy: boxes of master values are f32 and arrive joined, in chunks of any size",
          "[checkpoint]") {
  const auto backend = make_cpu_backend(1);
  Master master;
  for (const int64_t chunk : {1, 3, 20, 64})
    for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 20}, {3, 17}, {7, 8}}) {
      CAPTURE(chunk, begin, end);
      std::vector<float> scratch(static_cast<size_t>(2 * chunk));
      StateCopy copy(*backend, Tensor(scratch.data(), DType::f32, {2, chunk}));
      const StateSlice slice = master.slice(begin, end);
      std::vector<float> got(20, -1.0f);
      std::vector<void*> places;
      const std::vector<StateTensor> boxes = state_tensors({&slice, 1});
      float* at = got.data() + begin;
      for (const StateTensor& box : boxes) {
        CHECK(box.dtype == DType::f32);
        places.push_back(at);
        at += box.bytes() / 4;
      }
      copy.queue(boxes, places).synchronize();
      for (int64_t i = 0; i < 20; ++i) {
        const size_t n = static_cast<size_t>(i);
        CHECK(got[n] == (i < begin || i >= end ? -1.0f : master.values[n]));
      }
    }
}

TEST_CASE("state copy: copies come after what was queued before them, and all before their event",
          "[checkpoint]") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  LateBackend late(*backend, *stream);
  Master master;
  std::vector<float> chunks(6), plain = {1, 2, 3}, filled(2);
  StateCopy copy(late, Tensor(chunks.data(), DType::f32, {2, 3}));
  const StateSlice slice = master.slice(0, 20);
  std::vector<StateTensor> tensors = state_tensors({&slice, 1});
  tensors.push_back({"plain", DType::f32, {3}, {0}, {3}, plain.data()});
  tensors.push_back({"filled", DType::f32, {2}, {0}, {2}, filled.data()});
  std::vector<float> got(25, -1.0f);
  late.ops().fill(copy.stream(), Tensor(filled.data(), DType::f32, {2}), 7.0);
  const std::vector<void*> places = {got.data(), got.data() + 20, got.data() + 23};
  Event& copied = copy.queue(tensors, places);
  CHECK(got == std::vector<float>(25, -1.0f));
  copied.synchronize();
  std::vector<float> wanted = master.values;
  wanted.insert(wanted.end(), {1, 2, 3, 7, 7});
  CHECK(got == wanted);
}

TEST_CASE("state copy: halves need a chunk to be joined in", "[checkpoint]") {
  const auto backend = make_cpu_backend(1);
  Master master;
  const StateSlice slice = master.slice(0, 20);
  const std::vector<StateTensor> tensors = state_tensors({&slice, 1});
  std::vector<float> got(20);
  void* const place = got.data();
  StateCopy copy(*backend, {});
  CHECK_THROWS_WITH(copy.queue(tensors, {&place, 1}), Contains("'param.w' cannot be joined"));
}

TEST_CASE("state copy: bf16 parameters without lower halves, or with others, are not saved",
          "[checkpoint]") {
  Master master;
  StateSlice slice = master.slice(0, 20);
  slice.low = slice.low.rows(0, 19);
  CHECK_THROWS(state_boxes(slice));
  slice.low = {};
  CHECK_THROWS_WITH(state_tensors({&slice, 1}), Contains("without its lower half"));
  CHECK(state_boxes(slice).at(0).dtype == DType::f32);  // but they are read so
  slice.kind = "adamw.exp_avg";
  CHECK(state_tensors({&slice, 1}).at(0).dtype == DType::bf16);
}

TEST_CASE("state copy: a checkpoint's f32 and bf16 tensors are read as f32, others are refused",
          "[checkpoint]") {
  const ScratchFolder folder;
  const std::vector<float> wide = {0.1f, -2.0f, 3e38f};
  const std::vector<uint16_t> narrow = {0x3f80, 0xc000, 0x7f80};
  const std::vector<int32_t> whole = {1, 2, 3};
  const std::vector<StateTensor> tensors = {{"whole", DType::i32, {3}, {0}, {3}, whole.data()},
                                            {"wide", DType::f32, {3}, {0}, {3}, wide.data()},
                                            {"narrow", DType::bf16, {3}, {0}, {3}, narrow.data()}};
  CheckpointReader reader(CheckpointStore(folder.path(), 1).save({}, tensors));
  std::vector<float> got(3);
  reader.read_f32({"wide", DType::bf16, {3}, {0}, {3}}, got.data());
  CHECK(got == wide);
  reader.read_f32({"narrow", DType::f32, {3}, {1}, {2}}, got.data());
  CHECK(got == std::vector<float>{-2.0f, std::numeric_limits<float>::infinity(), 3e38f});
  CHECK_THROWS_AS(reader.read_f32({"whole", DType::f32, {3}, {0}, {3}}, got.data()), DataError);
  CHECK_THROWS_WITH(reader.read_f32({"wide", DType::f32, {4}, {0}, {3}}, got.data()),
                    Contains("f32[3]") && Contains("needs f32[4]"));
}

}  // namespace dstrain
