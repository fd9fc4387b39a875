#include "parallel/gathered_state.h"

#include <cstring>
#include <sstream>

#include "core/base/bf16.h"
#include "core/engine/parameter_io.h"

namespace dstrain {
namespace {

std::string key_of(const StateSlice& slice) {
  return slice.kind + "." + slice.parameter->spec.name;
}

void set_shape(GatheredTensor& tensor, std::vector<int64_t> shape) {
  if (!tensor.shape.empty()) return;
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  tensor.shape = std::move(shape);
  tensor.values.resize(static_cast<size_t>(elements));
  tensor.brought.resize(tensor.values.size());
}

}  // namespace

void gather_state(TrainEngine& engine, std::span<const StateSlice> slices, GatheredState& state) {
  for (const StateSlice& slice : slices) {
    const Parameter& p = *slice.parameter;
    GatheredTensor& tensor = state[key_of(slice)];
    set_shape(tensor, p.spec.shape);
    const std::vector<float> values = read_slice(engine.backend(), engine.stream(), slice);
    for (int64_t i = slice.begin; i < slice.end; ++i) {
      const size_t at = static_cast<size_t>(p.global_index(i));
      tensor.values[at] = values[static_cast<size_t>(i - slice.begin)];
      ++tensor.brought[at];
    }
  }
}

// Values travel as integers: their sum with zeros keeps every bit, also that of a negative zero.
void share_state(Communicator& ranks, Stream& stream, GatheredState& state) {
  std::string mine;
  for (const auto& [name, tensor] : state) {
    mine += name;
    for (const int64_t size : tensor.shape) mine += ' ' + std::to_string(size);
    mine += '\n';
  }
  for (const std::string& text : ranks.all_gather_text(mine)) {
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::string name;
      std::vector<int64_t> shape;
      words >> name;
      for (int64_t size = 0; words >> size;) shape.push_back(size);
      set_shape(state[name], std::move(shape));
    }
  }
  for (auto& [name, tensor] : state)
    for (void* data :
         {static_cast<void*>(tensor.values.data()), static_cast<void*>(tensor.brought.data())})
      ranks.all_reduce_sum(stream, Tensor(data, DType::i32, {std::ssize(tensor.values)}));
}

void require_whole(const GatheredState& state) {
  for (const auto& [name, tensor] : state)
    for (size_t i = 0; i < tensor.brought.size(); ++i)
      DSTRAIN_CHECK(tensor.brought[i] == 1, "element " + std::to_string(i) + " of '" + name +
                                                "' is on " + std::to_string(tensor.brought[i]) +
                                                " ranks");
}

std::string copy_difference(TrainEngine& engine, std::span<const StateSlice> slices,
                            const std::string& kind, const GatheredState& state) {
  for (const StateSlice& slice : slices) {
    if (slice.kind != kind) continue;
    const std::vector<float> values = read_slice(engine.backend(), engine.stream(), slice);
    const std::vector<float>& whole = state.at(key_of(slice)).values;
    const bool is_rounded = slice.data.dtype() == DType::bf16 && !slice.low.defined();
    for (int64_t i = slice.begin; i < slice.end; ++i) {
      float expected = whole[static_cast<size_t>(slice.parameter->global_index(i))];
      if (is_rounded) expected = bf16_to_f32(split_master(expected).high);
      if (std::memcmp(&values[static_cast<size_t>(i - slice.begin)], &expected, sizeof(float)) != 0)
        return key_of(slice);
    }
  }
  return "";
}

std::string bit_difference(const GatheredState& a, const GatheredState& b) {
  for (const auto& [name, tensor] : a) {
    const auto at = b.find(name);
    if (at == b.end() || at->second.values.size() != tensor.values.size() ||
        std::memcmp(at->second.values.data(), tensor.values.data(),
                    tensor.values.size() * sizeof(float)) != 0)
      return name;
  }
  return "";
}

}  // namespace dstrain
