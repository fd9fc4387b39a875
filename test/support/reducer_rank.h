// One rank of a test of gradient reducers: its memory, gradients with literal seeds, and one range
// over all parameters of a small set.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "parallel/grad_reducer.h"
#include "test/support/rank_threads.h"

namespace dstrain::test {

using Floats = std::vector<float>;

inline Floats random_floats(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats x(static_cast<size_t>(n));
  for (float& value : x) value = normal(random);
  return x;
}

inline Tensor as_tensor(Floats& x) {
  return Tensor(x.data(), DType::f32, {static_cast<int64_t>(x.size())});
}

inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Parameters of odd sizes, in three groups; the flat range has gaps, as it has in a model.
inline void declare_some(ParameterSet& set, Tie tie_of_embedding = Tie::none) {
  const auto declare = [&](const char* name, std::vector<int64_t> shape, int block) {
    ParameterSpec spec;
    spec.name = name;
    spec.weight_decay = shape.size() > 1;
    spec.shape = std::move(shape);
    spec.block = block;
    if (spec.name == "embedding") spec.tie = tie_of_embedding;
    set.declare(std::move(spec));
  };
  declare("embedding", {61, 7}, 0);
  declare("norm", {7}, 0);
  declare("weight", {130, 131}, 1);
  declare("bias", {3}, 1);
  set.finish_layout();
}

// All trainable elements, cut over the ranks.
inline GradRange whole_range(const ParameterSet& set, int ranks) {
  return {0, set.trainable_elements(), (set.trainable_elements() + ranks - 1) / ranks};
}

// Gives the reducer its memory, filled with NaN, as a plan would.
inline std::vector<DeviceMemory> make_reducer_memory(Backend& backend, GradReducer& reducer) {
  std::vector<DeviceMemory> memory;
  reducer.make_memory([&](const char* owner, MemoryKind kind, const auto& make) {
    Arena measuring(owner);
    make(measuring);
    const int64_t bytes = measuring.peak();
    memory.emplace_back(backend, bytes, kind);
    std::memset(memory.back().data(), 0xff, static_cast<size_t>(bytes));
    Arena arena(owner, memory.back().data(), bytes);
    make(arena);
  });
  return memory;
}

class ReducerRank {
 public:
  // The machine of rank r is r / ranks_per_node; 0 means that all ranks are on one.
  ReducerRank(RankContext& rank, const GradReducerOptions& options, int ranks_per_node = 0,
              Tie tie_of_embedding = Tie::none)
      : rank_(rank), dist_{rank.backend.ops(), rank.stream} {
    declare_some(parameters, tie_of_embedding);
    range = whole_range(parameters, rank.world.size());
    const int node = ranks_per_node == 0 ? 0 : rank.world.rank() / ranks_per_node;
    nodes_ = split_by_node(rank.world, "node" + std::to_string(node));
    reducer = make_grad_reducer(options, nodes_.ranks, parameters, {range});
    memory_ = make_reducer_memory(rank.backend, *reducer);
    reducer->clear(dist_);
  }

  int64_t elements() const { return rank_.world.size() * range.shard; }
  DistStream dist() const { return dist_; }
  // Another gradient for every rank and step; zero between parameters.
  Floats grad(uint32_t step) const {
    const Floats values =
        random_floats(elements(), 1000 * step + static_cast<uint32_t>(rank_.world.rank()));
    Floats whole(values.size(), 0.0f);
    for (const Parameter& p : parameters.all())
      std::copy_n(values.begin() + p.offset, p.numel(), whole.begin() + p.offset);
    return whole;
  }
  Floats reduce(Floats whole) {
    Floats shard(static_cast<size_t>(range.shard), -1.0f);
    reducer->reduce_scatter(dist_, 0, as_tensor(whole), as_tensor(shard));
    return shard;
  }
  Floats gather(Floats shard) {
    Floats whole(static_cast<size_t>(elements()), -1.0f);
    reducer->all_gather(dist_, 0, as_tensor(shard), as_tensor(whole));
    return whole;
  }
  Floats dense_reduce(Floats whole) {
    Floats shard(static_cast<size_t>(range.shard));
    rank_.world.reduce_scatter_sum(rank_.stream, as_tensor(whole), as_tensor(shard));
    return shard;
  }
  void end_step(bool finite = true) {
    StepScalars scalars;
    scalars.finite = finite ? 1 : 0;
    reducer->end_step(dist_, &scalars);
  }

  ParameterSet parameters;
  GradRange range;
  std::unique_ptr<GradReducer> reducer;

 private:
  RankContext& rank_;
  DistStream dist_;
  NodeSplit nodes_;
  std::vector<DeviceMemory> memory_;
};

}  // namespace dstrain::test
