// Numbers to propose instead of one that does not fit.
#pragma once

#include <cstdint>
#include <string>

namespace dstrain {

// The divisors of n next to `wanted`, below and above: "5 or 10".
std::string nearest_divisors(int64_t n, int64_t wanted);
// The multiples of `step` next to n: "16 or 24".
std::string nearest_multiples(int64_t step, int64_t n);

}  // namespace dstrain
