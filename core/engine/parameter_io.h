// Whole parameters between the device and host vectors. For loading, exporting and comparing, not
// for steps.
#pragma once

#include <string>
#include <vector>

#include "core/backend/backend.h"
#include "core/dist/param_store.h"

namespace dstrain {

// They copy and wait. Values are converted between float and the tensor's own type (f32, f64 or
// bf16).
std::vector<double> read_doubles(Backend& backend, Stream& stream, const Tensor& x);
std::vector<float> read_tensor(Backend& backend, Stream& stream, const Tensor& x);
void write_tensor(Backend& backend, Stream& stream, const std::vector<float>& values,
                  const Tensor& x);

// The same for state: master values in two halves are one float, bit for bit, and a parameter
// without its lower half is rounded as one with it.
std::vector<float> read_slice(Backend& backend, Stream& stream, const StateSlice& slice);
void write_slice(Backend& backend, Stream& stream, const std::vector<float>& values,
                 const StateSlice& slice);

}  // namespace dstrain
