// The result of `bench step` as text, and as JSON with the keys that other trainers' benchmarks
// use.
#pragma once

#include <optional>
#include <string>

#include "apps/step_bench.h"

namespace dstrain {

struct ProductsTime {
  double seconds = 0;
  int64_t calls = 0;
};

class StepReport {
 public:
  StepReport(const Config& config, const StepBenchResult& result);
  bool on_gpu() const { return gpu_; }
  // On a CPU: the products of a step by themselves.
  void add_products(const ProductsTime& products) { products_ = products; }

  std::string text() const;
  std::string json() const;  // one line
  // The operations whose name contains `filter`: a table, or JSON with one object a line.
  std::string operations_text(const std::string& filter) const;
  std::string operations_json(const std::string& filter) const;
  std::string heading() const;  // what was run on what, one line

 private:
  const Config& config_;
  const StepBenchResult& result_;
  bool gpu_ = false;
  double step_ = 0, tokens_ = 0, flops_ = 0;  // of a rank
  double parameters_ = 0;
  std::optional<ProductsTime> products_;
};

}  // namespace dstrain
