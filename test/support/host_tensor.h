// Tensors with memory of their own, and the one tolerance rule that tests compare them by.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

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
  void round_to_bf16();  // each element, whatever the type

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
// the unit roundoff of the candidate's type, u_sum that of f32 (of f64 for f64). Where F is bf16,
// arithmetic is in f32, so that only what is stored is rounded further: see bf16_roundings; and
// u_sum is 4 times as large, because tensor cores cut sums off instead of rounding them.
struct Tolerance {
  int64_t sum_length = 1;          // terms of the longest sum behind an element
  double roundings = 0;            // further roundings of the arithmetic on the path
  double bf16_roundings = 0;       // where F is bf16: roundings to it inside of an op
  bool expect_exact_zero = false;  // the reference is all zero and the candidate must be, too
};
// `run` is the type F of the run that gave the candidate, whose own may be a statistic's.
// Refuses different sizes, non-finite values on either side, and a reference of zeros alone.
Verdict compare(const HostTensor& candidate, const HostTensor& reference,
                const Tolerance& tolerance, DType run);
Verdict compare(const HostTensor& candidate, const HostTensor& reference,
                const Tolerance& tolerance);  // of a run in the candidate's type
// The same bits; the text names the first elements that differ.
Verdict compare_bits(const HostTensor& candidate, const HostTensor& reference);
// Relative L2 error <= limit and largest error <= 4 limit times the largest reference value.
Verdict compare_within(const HostTensor& candidate, const HostTensor& reference, double limit);

}  // namespace dstrain::test
