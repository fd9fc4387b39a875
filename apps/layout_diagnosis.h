// What a comparison of two layouts that failed looks like: which tensors are off, by what factor,
// and the class of fault that leaves such traces. Pure functions.
#pragma once

#include <string>
#include <vector>

#include "core/config/config.h"
#include "parallel/layout_run.h"

namespace dstrain {

struct TensorFault {
  std::string name;
  double difference = 0;  // relative L2
  double ratio = 0;       // of norms, to the reference
};

// Gradients of step 1 beyond the tolerance, worst first.
std::vector<TensorFault> gradient_faults(const Config& config, const LayoutRun& reference,
                                         const LayoutRun& run, const LayoutTolerances& tolerances);

// "routed experts", "norms", ...: what a parameter is, from its name.
std::string parameter_class(const std::string& name);

// Lines for people, without newlines: the worst tensor with its ratio, which classes are off, and
// what that looks like. `checks` are those of compare_layouts(); nothing if all are ok.
std::vector<std::string> diagnose(const Config& config, const LayoutRun& reference,
                                  const LayoutRun& run, const std::vector<LayoutCheck>& checks,
                                  const LayoutTolerances& tolerances);

}  // namespace dstrain
