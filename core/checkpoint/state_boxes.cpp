#include "core/checkpoint/state_boxes.h"

#include <iterator>
#include <string>
#include <string_view>
#include <utility>

namespace dstrain {
namespace {

bool is_bf16_parameter(const StateSlice& slice) {
  return slice.kind == "param" && slice.data.dtype() == DType::bf16;
}

DType saved_dtype(const StateSlice& slice) {
  return is_bf16_parameter(slice) ? DType::f32 : slice.data.dtype();
}

class BoxMaker {
 public:
  explicit BoxMaker(const StateSlice& slice)
      : slice_(slice),
        parameter_(*slice.parameter),
        name_(slice.kind + "." + parameter_.spec.name) {}

  std::vector<StateTensor> run() {
    DSTRAIN_CHECK(0 <= slice_.begin && slice_.begin <= slice_.end &&
                      slice_.end <= parameter_.numel() &&
                      slice_.data.numel() == slice_.end - slice_.begin && slice_.data.contiguous(),
                  "a slice of '" + name_ + "' is no run of its elements");
    DSTRAIN_CHECK(
        !slice_.low.defined() || (is_bf16_parameter(slice_) && slice_.low.dtype() == DType::u16 &&
                                  slice_.low.numel() == slice_.data.numel()),
        "the lower halves of '" + name_ + "' do not fit its values");
    if (slice_.begin == slice_.end) return {};
    const size_t dims = parameter_.local_shape.size();
    cut(0, std::vector<int64_t>(dims, 0), std::vector<int64_t>(dims, 1), slice_.begin, slice_.end);
    return std::move(boxes_);
  }

 private:
  // Elements [begin, end) of the sub-tensor of dims `dim` and later whose first indices are at[0 ..
  // dim): what lies inside a row at either end is cut further, whole rows between are one box.
  void cut(size_t dim, std::vector<int64_t> at, std::vector<int64_t> extent, int64_t begin,
           int64_t end) {
    const std::vector<int64_t>& shape = parameter_.local_shape;
    if (begin == end) return;
    if (dim == shape.size()) return add(at, extent);
    int64_t row = 1;
    for (size_t d = dim + 1; d < shape.size(); ++d) row *= shape[d];
    const auto inside_row = [&](int64_t index, int64_t from, int64_t to) {
      at[dim] = index;
      cut(dim + 1, at, extent, from, to);
    };
    int64_t first = begin / row;
    const int64_t last = end / row;
    if (begin % row != 0) {
      const int64_t stop = first == last ? end % row : row;
      inside_row(first, begin % row, stop);
      if (first == last) return;
      ++first;
    }
    if (first < last) {
      std::vector<int64_t> box_at = at, box_extent = extent;
      box_at[dim] = first;
      box_extent[dim] = last - first;
      for (size_t d = dim + 1; d < shape.size(); ++d) box_extent[d] = shape[d];
      add(box_at, box_extent);
    }
    if (end % row != 0) inside_row(last, 0, end % row);
  }

  void add(const std::vector<int64_t>& at, const std::vector<int64_t>& extent) {
    StateTensor box{name_,  saved_dtype(slice_), parameter_.spec.shape, at, extent, nullptr,
                    nullptr};
    for (size_t d = 0; d < at.size(); ++d) box.offset[d] += parameter_.local_begin[d];
    const auto place = [this](const Tensor& flat) {
      return static_cast<const char*>(flat.raw()) + elements_ * dtype_bytes(flat.dtype());
    };
    box.data = place(slice_.data);
    if (slice_.low.defined()) box.low = place(slice_.low);
    elements_ += box.bytes() / dtype_bytes(box.dtype);
    boxes_.push_back(std::move(box));
  }

  const StateSlice& slice_;
  const Parameter& parameter_;
  const std::string name_;
  std::vector<StateTensor> boxes_;
  int64_t elements_ = 0;  // of the boxes so far
};

}  // namespace

std::vector<StateTensor> state_boxes(const StateSlice& slice) {
  return BoxMaker(slice).run();
}

std::vector<StateTensor> state_tensors(std::span<const StateSlice> slices) {
  std::vector<StateTensor> all;
  for (const StateSlice& slice : slices) {
    DSTRAIN_CHECK(slice.low.defined() || !is_bf16_parameter(slice),
                  "'" + slice.parameter->spec.name + "' is saved without its lower half");
    std::vector<StateTensor> boxes = state_boxes(slice);
    all.insert(all.end(), std::make_move_iterator(boxes.begin()),
               std::make_move_iterator(boxes.end()));
  }
  return all;
}

std::map<std::string, std::vector<std::string>> kinds_by_parameter(const Manifest& manifest) {
  constexpr std::string_view kValue = "param.";
  std::map<std::string, std::vector<std::string>> kinds;
  for (const ManifestTensor& tensor : manifest.tensors)
    if (tensor.name.starts_with(kValue)) kinds[tensor.name.substr(kValue.size())] = {};
  // Kinds have dots in them, as names do; the longest name is the parameter's.
  for (const ManifestTensor& tensor : manifest.tensors)
    for (size_t dot = tensor.name.find('.'); dot != std::string::npos;
         dot = tensor.name.find('.', dot + 1)) {
      const auto parameter = kinds.find(tensor.name.substr(dot + 1));
      if (parameter == kinds.end()) continue;
      parameter->second.push_back(tensor.name.substr(0, dot));
      break;
    }
  return kinds;
}

}  // namespace dstrain
