// Checks for numerical operations: one op run in f32 and f64 on one to three threads, or on the GPU
// in f32 and bf16, and gradients against central differences.
//
// A test describes its tensors once in an OpCase and its op calls in bodies; element type, threads
// and device are the harness's to choose:
//
//   OpCase c(/*seed=*/7);
//   const Slot x = c.normal({T, D}), y = c.output({T, D});
//   const auto body = [=](Ops& ops, Stream& s, const Bound& b) { ops.add(s, b[x], b[x], b[y]); };
//   check_op(c, body, {{y, {.sum_length = 2}}});
//
// Where the environment has DSTRAIN_TEST_DEVICE=cuda, check_op() and run_op() in f32 compute on the
// GPU. Cases that can run there carry the tag [op], and CTest runs them once on each device: their
// bodies call ops and nothing else, because what tensors point to is not the host's memory. Without
// a GPU such a case says that it is skipped, and goes on with what the CPU gives.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/backend/backend.h"
#include "core/backend/ops.h"
#include "test/support/host_tensor.h"

namespace dstrain::test {

// The name of a tensor in an OpCase.
struct Slot {
  int index = -1;
};

// The tensors of one run.
class Bound {
 public:
  explicit Bound(std::vector<HostTensor> tensors) : tensors_(std::move(tensors)) {}
  // What a body sees on a device: tensors that lie elsewhere, whose elements cannot be read here.
  static Bound elsewhere(std::vector<Tensor> views);

  // An undefined Slot gives an absent tensor.
  Tensor operator[](Slot slot) const;
  // A slot of OpCase::scalars.
  StepScalars* scalars(Slot slot) const {
    return static_cast<StepScalars*>(operator[](slot).raw());
  }
  const HostTensor& at(Slot slot) const { return tensors_.at(static_cast<size_t>(slot.index)); }
  HostTensor& at(Slot slot) { return tensors_.at(static_cast<size_t>(slot.index)); }
  StepScalars scalars_at(Slot slot) const;  // their values
  size_t size() const { return tensors_.size(); }
  std::vector<HostTensor>& tensors() { return tensors_; }

 private:
  std::vector<HostTensor> tensors_;
  std::vector<Tensor> views_;
};

using OpBody = std::function<void(Ops&, Stream&, const Bound&)>;

// The tensors of a test. "Of type F" means f32, f64 or bf16, as the run chooses; statistics and
// parameter gradients (S of core/backend/ops.h) are f64 with f64, otherwise f32. Random values are
// numbers that f32 represents, so that runs in f32 and f64 see the same inputs.
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
  Slot scalars(const StepScalars& scalars);  // see Bound::scalars
  // Makes what would be of type F a statistic: c.stat(c.output({T})).
  Slot stat(Slot slot);

  // Fresh tensors with F = dtype.
  Bound bind(DType dtype) const;
  // The same in f64 with what is of type F rounded to bf16.
  Bound bind_rounded() const;
  // Rounds what is of type F to bf16.
  void round(Bound& bound) const;
  bool has_type_f() const;

 private:
  enum class Kind { type_f, stat, fixed };
  struct Entry {
    Kind kind;
    DType dtype;  // where fixed
    std::vector<int64_t> shape;
    std::vector<double> values;
  };
  Slot add(Entry entry);

  uint64_t seed_;
  std::vector<Entry> entries_;
};

// Scalars of a step whose gradients were not finite.
inline StepScalars skipped_step() {
  StepScalars scalars;
  scalars.finite = 0;
  return scalars;
}

// Runs the body once: in f32 on the device of the test, otherwise on a CPU back end.
Bound run_op(const OpCase& op_case, DType dtype, int threads, const OpBody& body);
// On the GPU, whatever the environment says; there must be one.
Bound run_op_on_gpu(const OpCase& op_case, DType dtype, const OpBody& body);

struct Expectation {
  Slot slot;
  Tolerance tolerance;
};
// On the CPU, f32 against f64 by the tolerance rule for the slots listed, and the same bits of
// every slot with 1, 2 and 3 threads in both types. On the GPU, f32 and bf16 against f64 on the
// CPU. With bf16 the reference rounds what is of type F after each op, as memory does. Besides the
// slots listed: integers are equal, what the op does not write on the CPU stays as it is, bytes
// beside tensors too, and a second run gives the same bits. Reports through Catch. Returns the run
// in f64.
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
