#include "core/backend/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

#include "core/backend/cpu_gemm.h"
#include "core/backend/cpu_info.h"
#include "core/backend/cpu_memory.h"
#include "core/backend/cpu_ops.h"
#include "core/backend/null_ops.h"
#include "core/backend/thread_pool.h"
#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr int64_t kScratchBytes = int64_t{8} << 20;  // per thread

class CpuStream : public Stream {
 public:
  void* native() const override { return nullptr; }
  void synchronize() override {}
};

class CpuEvent : public Event {
 public:
  void record(Stream&) override {}
  void wait_on(Stream&) override {}
  void synchronize() override {}
};

class CpuBackend : public Backend {
 public:
  CpuBackend(int threads, MatmulLog* log) : pool_(threads, kScratchBytes), ops_(pool_, log) {}

  std::string describe() const override {
    return std::to_string(pool_.threads()) + (pool_.threads() == 1 ? " thread, " : " threads, ") +
           check_instruction_set() + ", " + matmul_library();
  }
  bool is_cpu() const override { return true; }

  void* allocate(int64_t bytes, MemoryKind) override { return allocate_cpu_memory(bytes); }
  void deallocate(void* memory, int64_t bytes, MemoryKind) noexcept override {
    free_cpu_memory(memory, bytes);
  }

  int64_t workspace_bytes() const override {
    return pool_.threads() * kScratchBytes + Workspace::kBytes;
  }

  Ops& planning_ops() override { return null_ops_; }

  std::unique_ptr<Stream> make_stream() override { return std::make_unique<CpuStream>(); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<CpuEvent>(); }

  void copy(Stream&, void* destination, const void* source, int64_t bytes) override {
    DSTRAIN_CHECK(bytes >= 0, "a copy of a negative size");
    if (bytes > 0) std::memcpy(destination, source, static_cast<size_t>(bytes));
  }

  Ops& ops() override { return ops_; }

 private:
  ThreadPool pool_;
  CpuOps ops_;
  NullOps null_ops_;
};

const char* compiled_instruction_set() {
#if defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#elif defined(__SSE2__)
  return "sse2";
#elif defined(__ARM_NEON)
  return "neon";
#else
  return "generic";
#endif
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int threads, MatmulLog* log) {
  DSTRAIN_CHECK(threads >= 0, "a CPU back end has at least one thread");
  check_instruction_set();
  keep_gemm_single_threaded();
  return std::make_unique<CpuBackend>(threads == 0 ? available_cores() : threads, log);
}

int available_cores() {
  std::ifstream file("/proc/self/cgroup");
  const std::string groups{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const int64_t quota = cgroup_quota_cores(groups, "/sys/fs/cgroup");
  const int64_t cores = affinity_cores();
  return static_cast<int>(quota > 0 ? std::min(quota, cores) : cores);
}

std::string matmul_library() {
  return gemm_library();
}

std::string check_instruction_set() {
  const std::string missing = missing_instruction_sets();
  if (!missing.empty()) {
    throw RuntimeFailure("this program was compiled for a processor with " + missing +
                         ", which this one lacks; build it on this machine, or with "
                         "-DDSTRAIN_ARCH=x86-64-v3 (AVX2) or x86-64-v2");
  }
  return compiled_instruction_set();
}

}  // namespace dstrain
