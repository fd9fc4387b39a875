// Runs kernels on the CPU: the blocks of a launch one after the other, the threads of a block as
// fibers of one thread. A thread runs until it waits for others of its block or warp. Which block
// and which thread goes on then is drawn anew at each launch, so that a result that depends on it,
// as one does where a barrier is missing, changes from run to run. Where threads wait that nothing
// can wake, and where they use the warp's functions against the rules, the launch fails: the
// reason goes to standard error, and all later calls of the runtime return
// cudaErrorLaunchFailure, as on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_cpu {

// kernel<<<grid, block, shared_bytes, stream>>>(arguments) is
// Launch(grid, block, shared_bytes, stream).run(kernel, arguments).
struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;

  Launch(dim3 blocks, dim3 threads, size_t bytes = 0, cudaStream_t queue = nullptr)
      : grid(blocks), block(threads), shared_bytes(bytes), stream(queue) {}
  // Copies the arguments, and queues the kernel on the stream.
  template <class... Parameters>
  void run(void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) const {
    const std::tuple<Parameters...> copies(arguments...);
    queue_kernel(reinterpret_cast<const void*>(kernel),
                 [kernel, copies] { std::apply(kernel, copies); });
  }

 private:
  void queue_kernel(const void* kernel, std::function<void()> thread) const;
};

// Of dynamic shared memory a launch of the kernel may have so much; 48 KiB where nobody has called
// this, as on a GPU.
void allow_shared_memory(const void* kernel, size_t bytes);

// What the runtime reports of launches; cudaErrorLaunchFailure stays.
cudaError_t& launch_error();

// --- called by kernels

// Ends the launch.
[[noreturn]] void fail(std::string why);

// Until all threads of the block that have not ended are here.
void wait_for_block();

// The dynamic shared memory of the block. Shared memory is filled with NaN when a block begins.
void* dynamic_shared_memory();
template <class T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_memory());
}
void enter_shared_memory(void* memory, size_t bytes);
template <class... T>
void enter_shared(T&... variables) {
  (enter_shared_memory(&variables, sizeof variables), ...);
}

// Until all lanes of the mask that have not ended have called the same function with this mask.
// Fills in the values of those lanes, and returns which they are.
unsigned meet(const char* function, unsigned mask, const void* value, void* values_of_32,
              size_t bytes);
int lane();

// A copy by this thread that is done when the thread waits for it. Until then its destination
// holds NaN.
void begin_copy(void* to, const void* from, size_t bytes, size_t bytes_cleared);
void commit_copies();
void wait_for_copies(size_t groups_left);

}  // namespace cuda_on_cpu
