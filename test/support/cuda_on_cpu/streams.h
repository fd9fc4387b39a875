// Streams and events of the device that is the CPU, in the worst way that CUDA allows: work that is
// queued on a stream runs when somebody waits for it, the host or work of another stream that runs,
// and no earlier. Whoever forgets to wait finds what was there before. Thread-safe: work runs on
// the thread that waits, one thread at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <set>

namespace cuda_on_cpu {

// Held by every call of the runtime, and while work runs.
std::recursive_mutex& device_mutex();

// When the host waits for a stream, the others have done nothing (late), or all they could, one
// after the other: of work on two streams that no event orders, each comes first in one of these.
enum class Order { late, oldest_first, youngest_first };
void set_order(Order order);

// Without a stream it is done at once.
void queue(cudaStream_t stream, std::function<void()> work);
// The host waits for a stream.
void wait_for(cudaStream_t stream);
// Gives memory back when what is queued now has run. The driver waits for it; whoever counts on
// that is found out.
void free_when_unused(void* memory);

// Waits of streams for events that a host thread queues are numbered from its last call of this on,
// and those in the set are not made: planted faults.
void leave_out_waits(std::set<int64_t> numbers);
int64_t waits_made();

// Memory of exactly so many bytes for a kernel that is queued next, which holds until this is
// called with `first_of_operation` on the same stream and that is passed. It contains what the
// bytes at `contents`, beyond which it is NaN, hold when the stream gets here.
void* scratch_piece(cudaStream_t stream, bool first_of_operation, size_t bytes,
                    const void* contents, size_t contents_bytes);

}  // namespace cuda_on_cpu
