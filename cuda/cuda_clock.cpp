#include "cuda/cuda_clock.h"

#include <vector>

#include "cuda/cuda_check.h"
#include "cuda/cuda_device.h"

namespace dstrain {
namespace {

class CudaClock : public OpClock {
 public:
  ~CudaClock() override {
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  int mark(Stream& stream) override {
    if (used_ == events_.size()) {
      cudaEvent_t event = nullptr;
      check_cuda(cudaEventCreate(&event), "creating an event");
      events_.push_back(event);
    }
    check_cuda(cudaEventRecord(events_[used_], cuda(stream)), "recording an event");
    return static_cast<int>(used_++);
  }
  double seconds_between(int first, int second) override {
    const cudaEvent_t begin = events_.at(static_cast<size_t>(first)),
                      end = events_.at(static_cast<size_t>(second));
    check_cuda(cudaEventSynchronize(end), "waiting for the GPU");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin, end), "reading a time");
    return 1e-3 * static_cast<double>(ms);
  }
  void clear() override { used_ = 0; }

 private:
  std::vector<cudaEvent_t> events_;
  size_t used_ = 0;
};

}  // namespace

std::unique_ptr<OpClock> make_cuda_clock() {
  return std::make_unique<CudaClock>();
}

}  // namespace dstrain
