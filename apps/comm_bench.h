// Times what the ranks of a job exchange: what `bench comm` prints. Sizes and rates are those of
// NVIDIA's nccl-tests, so that figures can be held beside theirs:
//   size       of all_reduce the buffer; of reduce_scatter, all_gather and all_to_all the whole
//   that
//              is cut into a part for each rank; of send_recv the message, to the next rank
//   algorithm  size / time
//   bus        what each rank's link has carried, (n - 1) / n of that, twice for all_reduce; all of
//              it for send_recv
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/dist/communicator.h"

namespace dstrain {

struct CommTiming {
  std::string call;
  DType dtype = DType::f32;
  int64_t bytes = 0;
  double seconds = 0;     // of a call, the mean over ranks
  double bus_factor = 0;  // of the algorithm's rate

  double algorithm_rate() const { return static_cast<double>(bytes) / seconds; }  // bytes a second
  double bus_rate() const { return bus_factor * algorithm_rate(); }
};

// "4K,1M,1GiB" in bytes; binary units. UsageError, which names the option.
std::vector<int64_t> parse_sizes(std::string_view text, const char* option);
// From 4 KiB, each four times the one before: to 1 GiB on GPUs, 64 MiB on CPUs.
std::vector<int64_t> default_sizes(bool on_gpus);

// Every call in f32 and bf16. A collective call of at least two ranks; all get the same times.
// Allocates twice the largest size.
std::vector<CommTiming> bench_comm(Communicator& ranks, Backend& backend,
                                   const std::vector<int64_t>& sizes);

std::string comm_table(const std::vector<CommTiming>& timings);
// One object a line.
std::string comm_json(const std::vector<CommTiming>& timings, int ranks, const std::string& device);

}  // namespace dstrain
