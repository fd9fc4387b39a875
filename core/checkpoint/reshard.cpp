#include "core/checkpoint/reshard.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <vector>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/checkpoint/failpoint.h"
#include "core/checkpoint/json_strict.h"
#include "core/checkpoint/verify.h"

namespace dstrain {
namespace {

constexpr int kDims = Tensor::kMaxDims;
using Box = std::array<int64_t, kDims>;

// Right-aligned: missing leading dims become `fill`, so that every tensor has kDims dims.
Box pad_dims(std::span<const int64_t> values, int64_t fill) {
  Box box;
  box.fill(fill);
  std::copy(values.begin(), values.end(), box.end() - static_cast<std::ptrdiff_t>(values.size()));
  return box;
}

// What a stored and a wanted box of the same tensor have in common.
struct Overlap {
  Box extent;
  Box in_stored, in_wanted;  // where it begins in each of the two
  bool empty = false;
};

Overlap intersect(const Box& stored_offset, const Box& stored_extent, const Box& offset,
                  const Box& extent) {
  Overlap common;
  for (size_t d = 0; d < kDims; ++d) {
    const int64_t begin = std::max(stored_offset[d], offset[d]);
    const int64_t end = std::min(stored_offset[d] + stored_extent[d], offset[d] + extent[d]);
    common.extent[d] = std::max<int64_t>(end - begin, 0);
    common.in_stored[d] = begin - stored_offset[d];
    common.in_wanted[d] = begin - offset[d];
    common.empty = common.empty || end <= begin;
  }
  return common;
}

int64_t linear_index(const Box& index, const Box& shape) {
  int64_t linear = 0;
  for (size_t d = 0; d < kDims; ++d) linear = linear * shape[d] + index[d];
  return linear;
}

// The first dim from which on the overlap is one contiguous run in both boxes.
size_t first_contiguous_dim(const Overlap& common, const Box& stored_extent, const Box& extent) {
  size_t dim = kDims - 1;
  while (dim > 0 && common.extent[dim] == stored_extent[dim] && common.extent[dim] == extent[dim])
    --dim;
  return dim;
}

// Calls copy(first element in stored, first element in wanted, elements) for each contiguous run.
template <class Copy>
void for_each_run(const Overlap& common, const Box& stored_extent, const Box& extent, Copy copy) {
  const size_t run_dim = first_contiguous_dim(common, stored_extent, extent);
  int64_t run = 1, runs = 1;
  for (size_t d = 0; d < kDims; ++d) (d < run_dim ? runs : run) *= common.extent[d];
  Box step{};  // position inside the overlap, counted like an odometer over the dims before run_dim
  for (int64_t i = 0; i < runs; ++i) {
    Box from = common.in_stored, to = common.in_wanted;
    for (size_t d = 0; d < run_dim; ++d) from[d] += step[d], to[d] += step[d];
    copy(linear_index(from, stored_extent), linear_index(to, extent), run);
    for (size_t d = run_dim; d-- > 0;) {
      if (++step[d] < common.extent[d]) break;
      step[d] = 0;
    }
  }
}

void check_box(const ManifestTensor& tensor, std::span<const int64_t> offset,
               std::span<const int64_t> extent) {
  bool inside = offset.size() == tensor.shape.size() && extent.size() == tensor.shape.size();
  for (size_t d = 0; inside && d < offset.size(); ++d)
    inside = offset[d] >= 0 && extent[d] >= 0 && offset[d] <= tensor.shape[d] &&
             extent[d] <= tensor.shape[d] - offset[d];
  if (!inside)
    throw DataError(fmt::format("a slice at {} of extent {} is not inside tensor {} of shape {}",
                                offset, extent, printable_name(tensor.name), tensor.shape));
}

}  // namespace

CheckpointReader::CheckpointReader(const std::string& checkpoint_path)
    : CheckpointReader(checkpoint_path, load_manifest(checkpoint_path)) {}

CheckpointReader::CheckpointReader(std::string checkpoint_path, Manifest manifest)
    : path_(std::move(checkpoint_path)), manifest_(std::move(manifest)) {}

const SafetensorsReader& CheckpointReader::file(const std::string& name) {
  const auto it = files_.find(name);
  if (it != files_.end()) return it->second;
  return files_.try_emplace(name, join_path(path_, name), Links::refuse).first->second;
}

void CheckpointReader::read_slice(const std::string& name, std::span<const int64_t> offset,
                                  std::span<const int64_t> extent, void* dst) {
  const ManifestTensor& tensor = manifest_.at(name);
  check_box(tensor, offset, extent);
  const Box wanted_offset = pad_dims(offset, 0), wanted_extent = pad_dims(extent, 1);
  const int64_t element_bytes = dtype_bytes(tensor.dtype);
  // The manifest's slices cover the tensor exactly once, so every element is copied exactly once.
  for (const ManifestSlice& slice : tensor.slices) {
    const Box stored_extent = pad_dims(slice.extent, 1);
    const Overlap common =
        intersect(pad_dims(slice.offset, 0), stored_extent, wanted_offset, wanted_extent);
    if (common.empty) continue;
    const SafetensorsReader& reader = file(slice.file);
    const SafetensorsEntry& entry = reader.at(slice_key(tensor, slice));
    if (entry.type != to_safetensors_type(tensor.dtype) || entry.shape != slice.extent)
      throw DataError(
          fmt::format("'{}': tensor {} has another type or shape than the manifest says",
                      reader.path(), printable_name(entry.name)));
    for_each_run(common, stored_extent, wanted_extent,
                 [&](int64_t from, int64_t to, int64_t count) {
                   reader.read(entry, from * element_bytes, count * element_bytes,
                               static_cast<char*>(dst) + to * element_bytes);
                 });
    DSTRAIN_FAILPOINT("restore.after_slice");
  }
}

void CheckpointReader::throw_misfit(const StateTensor& wanted) const {
  const ManifestTensor& tensor = manifest_.at(wanted.name);
  throw DataError(fmt::format(
      "tensor {} is {}{} in checkpoint '{}', but this job needs {}{}; its configuration differs",
      printable_name(wanted.name), dtype_name(tensor.dtype), tensor.shape, path_,
      dtype_name(wanted.dtype), wanted.global_shape));
}

void CheckpointReader::read(const StateTensor& wanted, void* dst) {
  const ManifestTensor& tensor = manifest_.at(wanted.name);
  if (tensor.dtype != wanted.dtype || tensor.shape != wanted.global_shape) throw_misfit(wanted);
  read_slice(wanted.name, wanted.offset, wanted.extent, dst);
}

void CheckpointReader::read_f32(const StateTensor& wanted, float* dst) {
  const ManifestTensor& tensor = manifest_.at(wanted.name);
  const bool narrow = tensor.dtype == DType::bf16;
  if ((tensor.dtype != DType::f32 && !narrow) || tensor.shape != wanted.global_shape)
    throw_misfit(wanted);
  if (!narrow) return read_slice(wanted.name, wanted.offset, wanted.extent, dst);
  const int64_t elements = wanted.bytes() / dtype_bytes(wanted.dtype);
  std::vector<uint16_t> bits(static_cast<size_t>(elements));
  read_slice(wanted.name, wanted.offset, wanted.extent, bits.data());
  convert_to_f32(SafetensorsType::bf16, bits.data(), elements, dst);
}

}  // namespace dstrain
