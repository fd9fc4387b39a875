// Flat runs of a parameter as boxes of its global tensor, by brute force over all runs of small
// shapes.
#include "core/checkpoint/state_boxes.h"

#include <numeric>

#include "core/base/error.h"
#include "test/support/catch.h"

using namespace dstrain;

namespace {

Parameter parameter_of(std::vector<int64_t> local, std::vector<int64_t> begin) {
  Parameter p;
  p.spec.name = "w";
  p.spec.shape = local;
  for (size_t d = 0; d < local.size(); ++d) p.spec.shape[d] += begin[d] + 1;
  p.local_shape = std::move(local);
  p.local_begin = std::move(begin);
  return p;
}

// The numbers of the local elements that a box covers, row-major.
std::vector<int64_t> elements_of(const StateTensor& box, const Parameter& p) {
  std::vector<int64_t> all{0};
  for (size_t d = 0; d < box.offset.size(); ++d) {
    std::vector<int64_t> next;
    for (const int64_t outer : all)
      for (int64_t i = 0; i < box.extent[d]; ++i)
        next.push_back(outer * p.local_shape[d] + box.offset[d] - p.local_begin[d] + i);
    all = std::move(next);
  }
  return all;
}

// Empty if the boxes of run [begin, end) are right, else what is not.
std::string fault_of_run(const Parameter& p, const std::vector<float>& data, int64_t begin,
                         int64_t end) {
  // The box code reads the tensor's address alone.
  float* const at = const_cast<float*>(data.data()) + begin;
  const StateSlice slice{"param", &p, begin, end, Tensor(at, DType::f32, {end - begin})};
  const std::vector<StateTensor> boxes = state_boxes(slice);
  if (std::ssize(boxes) > 2 * std::ssize(p.local_shape) - 1) return "too many boxes";
  int64_t next = begin;
  for (const StateTensor& box : boxes) {
    if (box.name != "param.w" || box.global_shape != p.spec.shape || box.dtype != DType::f32)
      return "wrong label";
    const float* values = static_cast<const float*>(box.data);
    for (const int64_t i : elements_of(box, p)) {
      if (i != next++) return "elements out of order";
      if (*values++ != static_cast<float>(i)) return "wrong data";
    }
  }
  return next == end ? "" : "elements are missing";
}

}  // namespace

TEST_CASE("state boxes: every run of small shapes is covered once, in order, by few boxes",
          "[checkpoint]") {
  const std::vector<std::vector<int64_t>> shapes = {
      {1},       {7},       {3, 4},       {1, 5},       {5, 1},      {2, 3, 4},
      {3, 1, 2}, {1, 1, 6}, {2, 3, 2, 3}, {1, 2, 1, 4}, {3, 2, 2, 1}};
  for (const std::vector<int64_t>& shape : shapes) {
    for (const int64_t shift : {0, 2}) {
      const Parameter p = parameter_of(shape, std::vector<int64_t>(shape.size(), shift));
      std::vector<float> data(static_cast<size_t>(p.numel()));
      std::iota(data.begin(), data.end(), 0.0f);
      for (int64_t begin = 0; begin <= p.numel(); ++begin)
        for (int64_t end = begin; end <= p.numel(); ++end) {
          const std::string fault = fault_of_run(p, data, begin, end);
          if (!fault.empty()) {
            CAPTURE(Catch::StringMaker<std::vector<int64_t>>::convert(shape), shift, begin, end);
            FAIL(fault);
          }
        }
    }
  }
}

TEST_CASE("state boxes: a whole parameter is one box, an empty run none, the worst run 2 dims - 1",
          "[checkpoint]") {
  const Parameter p = parameter_of({3, 4, 5, 6}, {0, 1, 2, 3});
  std::vector<float> data(static_cast<size_t>(p.numel()));
  const auto boxes_of = [&](int64_t begin, int64_t end) {
    const Tensor run(data.data() + begin, DType::f32, {end - begin});
    return state_boxes({"adamw.exp_avg", &p, begin, end, run});
  };
  const std::vector<StateTensor> whole = boxes_of(0, p.numel());
  REQUIRE(whole.size() == 1);
  CHECK(whole[0].name == "adamw.exp_avg.w");
  CHECK(whole[0].offset == p.local_begin);
  CHECK(whole[0].extent == p.local_shape);
  CHECK(whole[0].data == data.data());
  CHECK(boxes_of(5, 5).empty());
  CHECK(boxes_of(1, p.numel() - 1).size() == 7);

  const std::vector<StateSlice> slices = {
      {"param", &p, 0, 1, Tensor(data.data(), DType::f32, {1})},
      {"param", &p, 1, 3, Tensor(data.data() + 1, DType::f32, {2})}};
  const std::vector<StateTensor> all = state_tensors(slices);
  REQUIRE(all.size() == 2);
  CHECK(all[1].extent == std::vector<int64_t>{1, 1, 1, 2});
}

TEST_CASE("state boxes: a slice that is no run of its parameter is refused", "[checkpoint]") {
  const Parameter p = parameter_of({2, 2}, {0, 0});
  float data[4] = {};
  CHECK_THROWS(state_boxes({"param", &p, 0, 5, Tensor(data, DType::f32, {4})}));
  CHECK_THROWS(state_boxes({"param", &p, 0, 3, Tensor(data, DType::f32, {4})}));
  CHECK_THROWS(state_boxes({"param", &p, 3, 2, Tensor(data, DType::f32, {1})}));
}
