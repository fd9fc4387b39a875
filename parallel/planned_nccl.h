// What NCCL takes of a GPU, worked out from its rules (those of 2.28) and from the variables that
// change them: channels, each of which is a multiprocessor while a call runs, and memory. Needs
// neither a GPU nor the library.
#pragma once

#include <cstdint>
#include <functional>

namespace dstrain {

class ProcessMesh;

// The value of an environment variable, null where it is not set.
using ReadVariable = std::function<const char*(const char* name)>;

// The most channels that one call uses.
struct NcclChannels {
  int collective = 1;
  int exchange = 1;  // of all with all, and of messages
};
// Of a communicator that is made with config.maxCTAs = max_ctas. Heeds NCCL_MAX_CTAS, which
// replaces max_ctas, NCCL_MIN_CTAS, NCCL_MIN_ and MAX_NCHANNELS (or NRINGS), and NCCL_MIN_ and
// MAX_P2P_NCHANNELS.
NcclChannels nccl_channels(int max_ctas, const ReadVariable& read);

struct NcclMemory {
  int communicators = 0;
  int64_t bytes = 0;
};
// An estimate for the rank of a plan, once its job has been made (parallel/planned_communicator.h),
// with NcclOptions' defaults: of ranks that reach each other over the NVLinks of one machine, with
// as many channels as there may be. Heeds the variables above and NCCL_BUFFSIZE. What NCCL takes
// once for a process, such as the code of its kernels, is not in it.
NcclMemory planned_nccl_memory(ProcessMesh& mesh, const ReadVariable& read);

}  // namespace dstrain
