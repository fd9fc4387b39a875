#include "core/backend/op_clock.h"

#include <chrono>
#include <vector>

namespace dstrain {
namespace {

class CpuClock : public OpClock {
 public:
  int mark(Stream&) override {
    marks_.push_back(std::chrono::steady_clock::now());
    return static_cast<int>(marks_.size()) - 1;
  }
  double seconds_between(int first, int second) override {
    return std::chrono::duration<double>(marks_.at(static_cast<size_t>(second)) -
                                         marks_.at(static_cast<size_t>(first)))
        .count();
  }
  void clear() override { marks_.clear(); }

 private:
  std::vector<std::chrono::steady_clock::time_point> marks_;
};

}  // namespace

std::unique_ptr<OpClock> make_cpu_clock() {
  return std::make_unique<CpuClock>();
}

std::unique_ptr<OpClock> Backend::make_clock() {
  return make_cpu_clock();
}

}  // namespace dstrain
