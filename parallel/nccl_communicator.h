// Communicator over NCCL, for ranks that each have a GPU of their own. Needs neither nccl.h nor the
// library to be included or linked: libnccl.so.2 is loaded by what first asks for it.
//
// What differs from ranks on host memory (core/dist/communicator.h):
//  - Sums are NCCL's. Their order is that of a ring, which depends on the layout and on sizes
//    alone; sums of bf16 are rounded at every rank. All ranks get the same bits, and so does
//    every run.
//  - A maximum may lose a NaN that some ranks have and others have not: NCCL takes fmax of two
//    values. Callers sum something that the NaN has reached as well, as the cross-entropy over a
//    cut vocabulary does.
//  - send() and recv() are for neighbours in rank order, the last rank and the first included,
//    and need prepare(Connections::messages) before.
//  - Tensors in host memory go to the communicator of host memory, once the stream has been
//    waited for; such a call has passed when it returns.
//
// Calls on device memory queue kernels that wait on the GPU for other ranks, and take
// multiprocessors while they do: a collective max_ctas at most, an exchange the next power of
// two, a message kMessageCtas, unless the environment says otherwise (parallel/planned_nccl.h).
// Nobody waits for ever as long as communicators that share ranks are called in the same order on
// all of them, and kernels that may wait at once, on different streams, fit side by side. Two
// streams of collectives, one of exchanges, and two sends each way (three, where there is one
// neighbour) take 112 of an H100's 132; a job that does all of that on a smaller GPU sets
// NCCL_MAX_CTAS=16. NCCL_LAUNCH_ORDER_IMPLICIT=1 would let kernels begin in the order of their
// calls. It stays off: where CUDA can only tell that
// a kernel has ended, nothing would begin behind a send. Hosts wait for each other in split() and
// prepare() alone, where all connections are made: one ring carries every collective, whatever its
// call, type and size, unless NCCL_ALGO in the environment allows other ways, which NCCL then
// connects at their first use. Without prepare(Connections::exchanges) the first exchange with a
// rank connects.
//
// Failures that NCCL notices are thrown by the next call, as PeerFailure where another rank is
// the cause; all communicators of the process are then aborted, so that no kernel waits on. A
// rank whose process ends is noticed by the launcher, and one that never comes by the watchdog.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "core/dist/communicator.h"
#include "parallel/planned_nccl.h"

namespace dstrain {

// Whether this program was built with NCCL.
bool has_nccl();
// Why ranks on GPUs could not exchange data, as a clause; "" if they can. Loads the library.
std::string why_no_nccl();
// "2.28.9", of the library; RuntimeFailure if it cannot be loaded.
std::string nccl_version();

struct NcclOptions {
  // How long ranks wait for each other while they connect.
  std::chrono::milliseconds timeout = std::chrono::minutes(10);
  // The most multiprocessors that a collective takes; NCCL_MAX_CTAS in the environment comes first.
  int max_ctas = 24;
  // Of the environment that NCCL reads, to know what it does with max_ctas.
  ReadVariable read_variable = [](const char*) { return nullptr; };
  // Bytes that are free on the GPU, to know what NCCL takes.
  std::function<int64_t()> free_memory = [] { return 0; };
};
inline constexpr int kMessageCtas = 8;

// Over the ranks of `host`, a communicator on host memory, which carries texts, barriers and what
// lies in host memory. A collective call; host and back end outlive the result and all that is
// split from it. The GPU is the calling thread's, on which the back end was opened.
//
// Sets NCCL_ALGO=Ring and NCCL_NVLS_ENABLE=0 (no multicast over NVLink) in the environment, unless
// they are there: rings make one set of connections, and sums in one order.
//
// Throws RuntimeFailure if NCCL is missing or older than 2.27, or ranks do not connect in time.
std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host, Backend& backend,
                                                     const NcclOptions& options = {});

// What NCCL has taken so far, by options.free_memory, for what make_nccl_communicator() made and
// all that was split from it. Nothing where `ranks` is none of these.
NcclMemory nccl_memory(const Communicator& ranks);

}  // namespace dstrain
