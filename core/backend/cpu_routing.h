// What the CPU's operations on routing share: a check of expert numbers, and how often each expert was
// chosen per run of slots.
#pragma once

#include <algorithm>
#include <string>

#include "core/backend/cpu_parallel.h"
#include "core/backend/routing.h"

namespace dstrain {

// An index that came from a recording of another run may be anything.
inline int32_t checked_expert(int32_t index, int64_t experts) {
  DSTRAIN_CHECK(
      index >= 0 && index < experts,
      "expert index " + std::to_string(index) + " is not in [0, " + std::to_string(experts) + ")");
  return index;
}

// Whether a choice below 0, of no expert, is legal.
enum class NoExpert { refused, left_out };

// Counts i32 choices (any shape, contiguous) in the workspace. Throws if an index is not in [0,
// experts).
class ExpertCounts {
 public:
  ExpertCounts(ThreadPool& pool, const Workspace& workspace, const Tensor& indices, int64_t experts,
               NoExpert none = NoExpert::refused)
      : stride_(partial_stride<int32_t>(experts)),
        runs_(indices.numel(), stride_ * static_cast<int64_t>(sizeof(int32_t)),
              /*min_rows=*/4096),
        counts_(workspace.get<int32_t>(runs_.count * stride_)) {
    DSTRAIN_CHECK(indices.dtype() == DType::i32 && indices.contiguous(),
                  "expert indices are " + indices.describe() + " where contiguous i32 belong");
    const int32_t* const chosen = indices.data<int32_t>();
    pool.run(runs_.count, [&](int64_t chunk, void*) {
      int32_t* const counts = of_chunk(chunk);
      std::fill(counts, counts + experts, 0);
      for (int64_t i = runs_.begin(chunk); i < runs_.end(chunk); ++i) {
        if (chosen[i] < 0 && none == NoExpert::left_out) continue;
        ++counts[checked_expert(chosen[i], experts)];
      }
    });
  }

  int64_t chunks() const { return runs_.count; }
  int64_t begin(int64_t chunk) const { return runs_.begin(chunk); }
  int64_t end(int64_t chunk) const { return runs_.end(chunk); }
  int32_t* of_chunk(int64_t chunk) const { return counts_ + chunk * stride_; }

 private:
  int64_t stride_;
  RowChunks runs_;
  int32_t* counts_;
};

}  // namespace dstrain
