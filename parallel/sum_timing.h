// How long sums of gradients take over the ranks of a job, with each method of compression.
#pragma once

#include <cstdint>

#include "core/backend/backend.h"
#include "parallel/grad_reducer.h"
#include "parallel/method_choice.h"

namespace dstrain {

// Times of ranges of up to `largest` elements, as those of the slowest rank: the same numbers on
// all ranks. What is timed is the reducer that the job would have, all-gather included where sums
// are gathered: compressing, exchanging and adding up on this device, from one mark of a stream to
// another. The methods take turns in a few repetitions. Of whole sums the fastest one counts, of
// compressed ones the median: where other work disturbs the measurement, nothing is lost. A link
// that takes long for one size is not asked about larger ones.
//
// A collective call of all ranks of `world`; each sums with `ranks`, which need not be the same.
// options.compression.method does not matter. Takes memory of about 20 bytes for an element of
// the largest range, kLargestTimed elements at most, and gives it back.
inline constexpr int64_t kLargestTimed = int64_t{1} << 23;
MethodTimes time_sums(const GradReducerOptions& options, const ReduceRanks& ranks, int64_t largest,
                      Communicator& world, Backend& backend);

}  // namespace dstrain
