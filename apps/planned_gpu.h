// Stands in for a GPU that is not here, so that the memory of its jobs can be planned: types and
// sizes are those of a GPU job, what a GPU's operations take for themselves is unknown.
#pragma once

#include <memory>
#include <string>

#include "core/backend/cpu_backend.h"

namespace dstrain {

class PlannedGpu : public Backend {
 public:
  std::string describe() const override { return "a GPU"; }
  bool is_cpu() const override { return false; }
  void* allocate(int64_t, MemoryKind) override { refuse(); }
  void deallocate(void*, int64_t, MemoryKind) noexcept override {}
  int64_t workspace_bytes() const override { return 0; }
  Ops& planning_ops() override { return cpu_->planning_ops(); }
  std::unique_ptr<Stream> make_stream() override { return cpu_->make_stream(); }
  std::unique_ptr<Event> make_event() override { return cpu_->make_event(); }
  void copy(Stream&, void*, const void*, int64_t) override { refuse(); }
  Ops& ops() override { return cpu_->planning_ops(); }

 private:
  [[noreturn]] static void refuse() {
    check_failed("a GPU", __FILE__, __LINE__, "a plan takes no memory and copies nothing");
  }
  const std::unique_ptr<Backend> cpu_ = make_cpu_backend(1);
};

}  // namespace dstrain
