// Takes the place of the nccl_*.cpp in a build without NCCL.
#include "core/base/error.h"
#include "parallel/nccl_communicator.h"

namespace dstrain {

bool has_nccl() {
  return false;
}

std::string why_no_nccl() {
  return "this program was built without NCCL";
}

std::string nccl_version() {
  throw RuntimeFailure(why_no_nccl());
}

std::unique_ptr<Communicator> make_nccl_communicator(Communicator&, Backend&, const NcclOptions&) {
  throw RuntimeFailure("ranks on GPUs exchange data through NCCL, and " + why_no_nccl() +
                       ": build it again where nccl.h is (scripts/cuda_headers.sh brings it), or "
                       "set run.device: cpu");
}

NcclMemory nccl_memory(const Communicator&) {
  return {};
}

}  // namespace dstrain
