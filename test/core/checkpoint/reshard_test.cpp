#include "core/checkpoint/reshard.h"

#include <numeric>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "test/core/checkpoint/checkpoint_fixture.h"

namespace dstrain {
namespace {

using Catch::Contains;
using checkpoint_test::ScratchFolder;

using Dims = std::vector<int64_t>;

int64_t product(const Dims& dims) {
  return std::accumulate(dims.begin(), dims.end(), int64_t{1}, std::multiplies<>());
}

// A box of a global tensor whose element at linear index i is i.
struct Slice {
  Dims offset, extent;
  std::vector<int32_t> values;
};

Slice cut(const Dims& shape, const Dims& offset, const Dims& extent) {
  Slice slice{offset, extent, {}};
  for (int64_t i = 0; i < product(extent); ++i) {
    int64_t rest = i, linear = 0, stride = 1;
    for (size_t d = shape.size(); d-- > 0;) {
      linear += (offset[d] + rest % extent[d]) * stride;
      rest /= extent[d];
      stride *= shape[d];
    }
    slice.values.push_back(static_cast<int32_t>(linear));
  }
  return slice;
}

// Cuts a box in two at random places until it is small or luck ends.
void split(const Dims& shape, Dims offset, Dims extent, uint64_t seed, int depth,
           std::vector<Slice>& out) {
  const uint64_t r = random_u64(seed, static_cast<uint64_t>(depth), out.size());
  const size_t d = shape.empty() ? 0 : r % shape.size();
  if (shape.empty() || depth == 4 || extent[d] < 2 || (r >> 10) % 5 == 0) {
    out.push_back(cut(shape, offset, extent));
    return;
  }
  const int64_t first = 1 + static_cast<int64_t>((r >> 20) % static_cast<uint64_t>(extent[d] - 1));
  Dims second_offset = offset, second_extent = extent;
  second_offset[d] += first;
  second_extent[d] -= first;
  extent[d] = first;
  split(shape, offset, extent, seed, depth + 1, out);
  split(shape, second_offset, second_extent, seed, depth + 1, out);
}

// Saves the slices of "w" dealt out to `ranks` shards.
std::string save_slices(CheckpointStore& store, const Dims& shape, const std::vector<Slice>& slices,
                        size_t ranks) {
  const SaveAttempt attempt = store.begin(1);
  std::vector<ShardInfo> shards;
  for (size_t rank = 0; rank < ranks; ++rank) {
    std::vector<StateTensor> state;
    for (size_t i = rank; i < slices.size(); i += ranks)
      state.push_back(
          {"w", DType::i32, shape, slices[i].offset, slices[i].extent, slices[i].values.data()});
    const ShardInfo shard = store.write_shard(attempt, static_cast<int64_t>(rank), state);
    shards.push_back(
        parse_shard_info(encode_shard_info(shard), "rank"));  // as it travels between ranks
  }
  CheckpointMeta meta;
  meta.step = 1;
  return store.commit(attempt, shards, meta);
}

}  // namespace

TEST_CASE("reshard: any slice comes back from any layout", "[reshard]") {
  const std::vector<Dims> shapes = {{}, {1}, {13}, {7, 9}, {4, 5, 6}, {3, 4, 5, 2}, {0, 4}};
  for (uint64_t trial = 0; trial < 42; ++trial) {
    const Dims& shape = shapes[trial % shapes.size()];
    CAPTURE(trial, shape);
    const ScratchFolder folder;
    CheckpointStore store(folder.path(), 2);
    std::vector<Slice> slices;
    split(shape, Dims(shape.size(), 0), shape, trial, 0, slices);
    const std::string path = save_slices(store, shape, slices, 1 + trial % 3);
    REQUIRE(check_checkpoint(path, CheckDepth::contents).problems.empty());
    CheckpointReader reader(path);
    for (uint64_t i = 0; i < 12; ++i) {
      Dims offset, extent;
      for (size_t d = 0; d < shape.size(); ++d) {
        const uint64_t r = random_u64(99, trial * 100 + i, d);
        const auto size = static_cast<uint64_t>(shape[d]);
        offset.push_back(static_cast<int64_t>(i == 0 ? 0 : r % (size + 1)));
        const auto room = static_cast<uint64_t>(shape[d] - offset[d]);
        extent.push_back(static_cast<int64_t>(i == 0 ? size : (r >> 32) % (room + 1)));
      }
      const Slice wanted = cut(shape, offset, extent);
      std::vector<int32_t> read(wanted.values.size() + 2, -1);  // one guard on each side
      reader.read_slice("w", offset, extent, read.data() + 1);
      CHECK(read.front() == -1);
      CHECK(read.back() == -1);
      CHECK(std::vector<int32_t>(read.begin() + 1, read.end() - 1) == wanted.values);
    }
  }
}

TEST_CASE("reshard: what cannot be read says why", "[reshard]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 2);
  const Dims shape = {4, 6};
  const std::string path = save_slices(store, shape, {cut(shape, {0, 0}, {4, 6})}, 1);
  CheckpointReader reader(path);
  std::vector<int32_t> out(24);
  const Dims zero = {0, 0}, all = {4, 6}, too_far = {1, 0}, flat = {24}, negative = {-1, 0};
  CHECK_THROWS_WITH(reader.read_slice("v", zero, all, out.data()), Contains("has no tensor 'v'"));
  CHECK_THROWS_WITH(reader.read_slice("w", too_far, all, out.data()),
                    Contains("not inside tensor 'w'"));
  CHECK_THROWS_WITH(reader.read_slice("w", negative, all, out.data()),
                    Contains("not inside tensor 'w'"));
  CHECK_THROWS_WITH(reader.read_slice("w", flat, flat, out.data()),
                    Contains("not inside tensor 'w'"));
  CHECK_THROWS_WITH(reader.read({"w", DType::f32, shape, zero, all, nullptr}, out.data()),
                    Contains("is i32[4, 6] in checkpoint") && Contains("needs f32[4, 6]"));
  CHECK_THROWS_WITH(reader.read({"w", DType::i32, {4, 7}, zero, all, nullptr}, out.data()),
                    Contains("needs i32[4, 7]"));
  CHECK_NOTHROW(reader.read({"w", DType::i32, shape, zero, all, nullptr}, out.data()));

  std::filesystem::remove(path + "/rank-00000.safetensors");
  CheckpointReader without_file(path);
  CHECK_THROWS_AS(without_file.read_slice("w", zero, all, out.data()), NotFoundError);
}

TEST_CASE("reshard: a file that does not fit the manifest is refused", "[reshard]") {
  const ScratchFolder folder, other;
  CheckpointStore store(folder.path(), 2), other_store(other.path(), 2);
  const Dims shape = {4, 6}, wider = {4, 7}, zero = {0, 0};
  const std::string path = save_slices(store, shape, {cut(shape, {0, 0}, {4, 6})}, 1);
  const std::string other_path = save_slices(other_store, wider, {cut(wider, {0, 0}, {4, 7})}, 1);
  std::filesystem::copy_file(other_path + "/rank-00000.safetensors",
                             path + "/rank-00000.safetensors",
                             std::filesystem::copy_options::overwrite_existing);
  CheckpointReader reader(path);
  std::vector<int32_t> out(24);
  CHECK_THROWS_WITH(reader.read_slice("w", zero, shape, out.data()),
                    Contains("another type or shape"));
}

}  // namespace dstrain
