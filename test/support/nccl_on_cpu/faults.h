// Faults of NCCL's stand-in.
#pragma once

namespace nccl_on_cpu {

// The calling thread's rank makes so many calls of NCCL more, and at the next one its communicator
// finds that another rank is gone. Below 0: it does not.
void fail_after(int calls);

}  // namespace nccl_on_cpu
