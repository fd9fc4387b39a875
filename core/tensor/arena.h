// A bump allocator over one buffer. Addresses are the same in every step, because the same code makes
// the same requests in the same order. A measuring arena has no memory: it hands out tensors that
// must not be touched and records how much a real one needs, so that a dry run of the step is the
// memory plan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/tensor/tensor.h"

namespace dstrain {

class Arena {
 public:
  static constexpr int64_t kAlignment = 256;

  // Measures only.
  explicit Arena(std::string name) : name_(std::move(name)) {}
  // Hands out `memory`, which the caller owns and keeps.
  Arena(std::string name, void* memory, int64_t bytes)
      : name_(std::move(name)), base_(static_cast<char*>(memory)), capacity_(bytes) {}

  bool measuring() const { return base_ == nullptr; }
  int64_t used() const { return used_; }
  int64_t peak() const { return peak_; }  // bytes that a real arena needs for what was done so far
  int64_t capacity() const { return capacity_; }
  const std::string& name() const { return name_; }

  // Throws RuntimeFailure naming arena, tag and size when the plan was too small. Not zeroed.
  Tensor make(DType dtype, std::initializer_list<int64_t> shape, const char* tag);
  Tensor like(const Tensor& x, const char* tag);  // same dtype and shape, contiguous
  void* raw(int64_t bytes, const char* tag);

  // Everything made after mark() is given back by rewind(); marks nest.
  int64_t mark() const { return used_; }
  void rewind(int64_t mark) { used_ = mark; }
  void reset() { used_ = 0; }

 private:
  std::string name_;
  char* base_ = nullptr;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
  int64_t peak_ = 0;
};

// Rewinds when it goes out of scope.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.rewind(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  int64_t mark_;
};

}  // namespace dstrain
