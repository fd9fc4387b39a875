#include "core/checkpoint/manifest.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "core/base/error.h"
#include "core/checkpoint/json_strict.h"
#include "core/checkpoint/safetensors.h"

namespace dstrain {
namespace {

bool overlap(const ManifestSlice& a, const ManifestSlice& b) {
  for (size_t d = 0; d < a.offset.size(); ++d)
    if (a.offset[d] >= b.offset[d] + b.extent[d] || b.offset[d] >= a.offset[d] + a.extent[d])
      return false;
  return true;
}

// The caller has checked that the box lies inside the tensor, so nothing overflows.
int64_t volume(const std::vector<int64_t>& extent) {
  int64_t product = 1;
  for (const int64_t size : extent) product *= size;
  return product;
}

void check_slice_box(const ManifestTensor& tensor, const ManifestSlice& slice) {
  const auto fail = [&](const char* problem) {
    throw DataError(fmt::format("the slice at {} of extent {} of tensor {} {}", slice.offset,
                                slice.extent, printable_name(tensor.name), problem));
  };
  const size_t dims = tensor.shape.size();
  if (slice.offset.size() != dims || slice.extent.size() != dims)
    fail(fmt::format("has not the tensor's {} dims", dims).c_str());
  for (size_t d = 0; d < dims; ++d) {
    if (slice.offset[d] < 0 || slice.extent[d] < 0 || slice.offset[d] > tensor.shape[d] ||
        slice.extent[d] > tensor.shape[d] - slice.offset[d])
      fail(fmt::format("leaves the shape {}", tensor.shape).c_str());
    if (slice.extent[d] == 0 && tensor.shape[d] != 0) fail("is empty");
  }
}

}  // namespace

const ManifestTensor* Manifest::find(std::string_view name) const {
  const auto it = std::lower_bound(
      tensors.begin(), tensors.end(), name,
      [](const ManifestTensor& tensor, std::string_view wanted) { return tensor.name < wanted; });
  return it == tensors.end() || it->name != name ? nullptr : &*it;
}

const ManifestTensor& Manifest::at(std::string_view name) const {
  if (const ManifestTensor* tensor = find(name)) return *tensor;
  throw DataError(fmt::format(
      "the checkpoint of step {} has no tensor {}; its model is another one than this job's",
      meta.step, printable_name(name)));
}

int64_t Manifest::bytes() const {
  int64_t sum = 0;
  for (const ManifestFile& file : files) sum += file.bytes;
  return sum;
}

std::string slice_key(const ManifestTensor& tensor, const ManifestSlice& slice) {
  if (slice.extent == tensor.shape) return tensor.name;
  std::string box;
  for (size_t d = 0; d < slice.offset.size(); ++d)
    box += fmt::format("{}{}:{}", d == 0 ? "" : ",", slice.offset[d],
                       slice.offset[d] + slice.extent[d]);
  return fmt::format("{}[{}]", tensor.name, box);
}

void check_coverage(const ManifestTensor& tensor) {
  const std::string name = printable_name(tensor.name);
  if (tensor.shape.size() > static_cast<size_t>(Tensor::kMaxDims))
    throw DataError(fmt::format("tensor {} has {} dims; at most {} are supported", name,
                                tensor.shape.size(), Tensor::kMaxDims));
  if (!checked_tensor_bytes(tensor.shape, dtype_bytes(tensor.dtype)))
    throw DataError(fmt::format("tensor {} has the shape {}, whose size overflows 64 bits", name,
                                tensor.shape));
  if (tensor.slices.empty()) throw DataError(fmt::format("tensor {} has no slices", name));

  std::vector<const ManifestSlice*> by_first_dim;
  for (const ManifestSlice& slice : tensor.slices) {
    check_slice_box(tensor, slice);
    by_first_dim.push_back(&slice);
  }
  const auto first = [](const ManifestSlice* s) { return s->offset.empty() ? 0 : s->offset[0]; };
  std::sort(by_first_dim.begin(), by_first_dim.end(),
            [&](const auto* a, const auto* b) { return first(a) < first(b); });
  // Boxes inside the tensor that do not overlap cover it when their volumes add up to its own.
  int64_t covered = 0;
  for (size_t i = 0; i < by_first_dim.size(); ++i) {
    const ManifestSlice& a = *by_first_dim[i];
    int64_t sum = 0;
    if (__builtin_add_overflow(covered, volume(a.extent), &sum)) sum = INT64_MAX;
    covered = sum;
    for (size_t j = i + 1; j < by_first_dim.size(); ++j) {
      const ManifestSlice& b = *by_first_dim[j];
      if (!a.offset.empty() && b.offset[0] >= a.offset[0] + a.extent[0]) break;
      if (overlap(a, b))
        throw DataError(
            fmt::format("the slices at {} and {} of tensor {} overlap", a.offset, b.offset, name));
    }
  }
  if (covered != volume(tensor.shape))
    throw DataError(fmt::format("the slices of tensor {} hold {} of its {} elements", name, covered,
                                volume(tensor.shape)));
}

std::vector<ManifestTensor> merge_shards(std::span<const ShardInfo> shards) {
  std::map<std::string_view, ManifestTensor> merged;
  for (const ShardInfo& shard : shards) {
    for (const ManifestTensor& tensor : shard.tensors) {
      const auto [it, is_new] = merged.try_emplace(tensor.name, tensor);
      ManifestTensor& global = it->second;
      if (is_new) continue;
      if (global.dtype != tensor.dtype || global.shape != tensor.shape)
        throw DataError(fmt::format("tensor {} is {}{} in '{}', but {}{} in '{}'",
                                    printable_name(tensor.name), dtype_name(tensor.dtype),
                                    tensor.shape, shard.file.name, dtype_name(global.dtype),
                                    global.shape, global.slices.front().file));
      global.slices.insert(global.slices.end(), tensor.slices.begin(), tensor.slices.end());
    }
  }
  std::vector<ManifestTensor> out;
  for (auto& [name, tensor] : merged) {
    check_coverage(tensor);
    out.push_back(std::move(tensor));
  }
  return out;
}

}  // namespace dstrain
