// Checks for numerical operations: tensors with memory of their own, the one tolerance rule, one op
// run in f32 and f64 on one to three threads, and gradients against central differences.
//
// A test describes its tensors once in an OpCase and its op calls in bodies; the element type and
// the number of threads are the harness's to choose:
//
//   OpCase c(/*seed=*/7);
//   const Slot x = c.normal({T, D}), y = c.output({T, D});
//   const auto body = [=](Ops& ops, Stream& s, const Bound& b) { ops.add(s, b[x], b[x], b[y]); };
//   check_op(c, body, {{y, {.sum_length = 2}}});
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iosfwd>
#include <string>
#include <vector>

#include "core/backend/backend.h"
#include "core/backend/ops.h"
#include "core/tensor/tensor.h"

namespace dstrain::test {

// A contiguous tensor in host memory, zero at first. Elements are read and written as doubles
// whatever the type; bf16 rounds to the nearest even.
class HostTensor {
 public:
  HostTensor() = default;
  HostTensor(DType dtype, std::vector<int64_t> shape);
  HostTensor(DType dtype, std::vector<int64_t> shape, const std::vector<double>& values);

  operator Tensor() const { return view(); }  // NOLINT: stands in for a Tensor in calls of ops
  Tensor view() const;
  DType dtype() const { return dtype_; }
  int64_t numel() const { return numel_; }
  double get(int64_t i) const;
  void set(int64_t i, double value);
  std::vector<double> values() const;
  bool same_bits(const HostTensor& other) const;

 private:
  DType dtype_ = DType::f32;
  std::vector<int64_t> shape_;
  int64_t numel_ = 0;
  mutable std::vector<std::byte> memory_;
};

// What a check found; the text names the worst element. Converts to bool, so that
// CHECK(compare(...)) prints it.
struct Verdict {
  bool ok = false;
  std::string text;
  explicit operator bool() const { return ok; }
};
std::ostream& operator<<(std::ostream& out, const Verdict& verdict);

// The tolerance rule of the project: relative L2 error <= (1 + roundings) u + u_sum
// sqrt(sum_length), and the largest error <= 4 times that times the largest reference value. u is
// the unit roundoff of the candidate's type, u_sum that of f32 (of f64 for f64).
struct Tolerance {
  int64_t sum_length = 1;          // terms of the longest sum behind an element
  double roundings = 0;            // further roundings to the candidate's type on the path
  bool expect_exact_zero = false;  // the reference is all zero and the candidate must be, too
};
// Refuses different sizes, non-finite values on either side, and a reference of zeros alone.
Verdict compare(const HostTensor& candidate, const HostTensor& reference,
                const Tolerance& tolerance);
// Relative L2 error <= limit and largest error <= 4 limit times the largest reference value.
Verdict compare_within(const HostTensor& candidate, const HostTensor& reference, double limit);

// The name of a tensor in an OpCase.
struct Slot {
  int index = -1;
};

// The tensors of one run.
class Bound {
 public:
  explicit Bound(std::vector<HostTensor> tensors) : tensors_(std::move(tensors)) {}
  // An undefined Slot gives an absent tensor.
  Tensor operator[](Slot slot) const { return slot.index < 0 ? Tensor() : at(slot).view(); }
  const HostTensor& at(Slot slot) const { return tensors_.at(static_cast<size_t>(slot.index)); }
  HostTensor& at(Slot slot) { return tensors_.at(static_cast<size_t>(slot.index)); }
  size_t size() const { return tensors_.size(); }

 private:
  std::vector<HostTensor> tensors_;
};

using OpBody = std::function<void(Ops&, Stream&, const Bound&)>;

// The tensors of a test. "Of type F" means f32 or f64, as the run chooses. Random values are
// numbers that f32 represents, so that both runs see the same inputs.
class OpCase {
 public:
  explicit OpCase(uint64_t seed) : seed_(seed) {}

  Slot normal(std::vector<int64_t> shape, double std = 1, double mean = 0);  // of type F
  Slot uniform(std::vector<int64_t> shape, double low, double high);         // of type F
  Slot values(std::vector<int64_t> shape, std::vector<double> values);       // of type F
  Slot integers(std::vector<int64_t> shape, int64_t low, int64_t high);      // i32 in [low, high)
  Slot fixed(DType dtype, std::vector<int64_t> shape, std::vector<double> values);
  // Filled with NaN (integers: -77), so that an element that the op forgets is noticed.
  Slot output(std::vector<int64_t> shape);  // of type F
  Slot output(DType dtype, std::vector<int64_t> shape);

  // Fresh tensors with F = dtype.
  Bound bind(DType dtype) const;

 private:
  struct Entry {
    bool of_type_f;
    DType dtype;
    std::vector<int64_t> shape;
    std::vector<double> values;
  };
  Slot add(Entry entry);

  uint64_t seed_;
  std::vector<Entry> entries_;
};

// Runs the body once on a CPU back end.
Bound run_op(const OpCase& op_case, DType dtype, int threads, const OpBody& body);

struct Expectation {
  Slot slot;
  Tolerance tolerance;
};
// f32 against f64 by the tolerance rule for the slots listed, and the same bits of every slot with
// 1, 2 and 3 threads in both types. Reports through Catch. Returns the f64 run.
Bound check_op(const OpCase& op_case, const OpBody& body,
               const std::vector<Expectation>& expectations);

// `value` is a tensor of the forward pass, `gradient` its gradient.
struct GradientPair {
  Slot value, gradient;
};
// In f64: `forward`, then `backward` on the same tensors. The initial contents of each output's
// gradient slot weight that output in a scalar loss; the final contents of each input's gradient
// slot must be the derivative of this loss by central differences, for every element. A slot may be
// both (in place).
Verdict check_gradient(const OpCase& op_case, const OpBody& forward, const OpBody& backward,
                       const std::vector<GradientPair>& outputs,
                       const std::vector<GradientPair>& inputs, double limit = 1e-7);

}  // namespace dstrain::test
