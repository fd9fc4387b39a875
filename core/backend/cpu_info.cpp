#include "core/backend/cpu_info.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>
#include <vector>

namespace dstrain {
namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

int64_t cores_of(int64_t quota_us, int64_t period_us) {
  if (quota_us <= 0 || period_us <= 0) return kNoLimit;
  return std::max<int64_t>(1, (quota_us + period_us - 1) / period_us);
}

// cpu.max holds "max 100000" or "150000 100000".
int64_t limit_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  int64_t quota = 0, period = 0;
  return file >> quota >> period ? cores_of(quota, period) : kNoLimit;
}

int64_t limit_v1(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"),
      period_file(folder + "/cpu.cfs_period_us");
  int64_t quota = 0, period = 0;
  return quota_file >> quota && period_file >> period ? cores_of(quota, period) : kNoLimit;
}

// The tightest limit of `path` and the groups above it. In a container the path may be the host's
// and not exist below the mount; the mount itself is the container's group then.
template <class Limit>
int64_t tightest(const std::string& mount, std::string path, const Limit& limit) {
  int64_t cores = limit(mount);
  while (!path.empty() && path != "/") {
    cores = std::min(cores, limit(mount + path));
    path.erase(path.find_last_of('/'));
  }
  return cores;
}

bool names_cpu_controller(const std::string& controllers) {
  return ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

}  // namespace

int64_t cgroup_quota_cores(const std::string& self_cgroup, const std::string& mount) {
  int64_t cores = kNoLimit;
  std::istringstream lines(self_cgroup);
  for (std::string line; std::getline(lines, line);) {  // hierarchy number:controllers:path
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (!path.empty() && path[0] != '/') continue;
    if (controllers.empty()) {
      cores = std::min(cores, tightest(mount, path, limit_v2));
      cores = std::min(cores, tightest(mount + "/unified", path, limit_v2));
    } else if (names_cpu_controller(controllers)) {
      cores = std::min(cores, tightest(mount + "/cpu", path, limit_v1));
      cores = std::min(cores, tightest(mount + "/" + controllers, path, limit_v1));
    }
  }
  return cores == kNoLimit ? 0 : cores;
}

int64_t affinity_cores() {
#ifdef __linux__
  // The kernel refuses a mask that is shorter than its own.
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    std::vector<unsigned long> mask(CPU_ALLOC_SIZE(cpus) / sizeof(unsigned long));
    auto* const set = reinterpret_cast<cpu_set_t*>(mask.data());
    const size_t bytes = mask.size() * sizeof(unsigned long);
    if (sched_getaffinity(0, bytes, set) == 0) return std::max(1, CPU_COUNT_S(bytes, set));
  }
#endif
  return std::max(1U, std::thread::hardware_concurrency());
}

std::string missing_instruction_sets() {
  std::string missing;
  [[maybe_unused]] const auto need = [&](const char* name, bool present) {
    if (!present) missing += (missing.empty() ? "" : ", ") + std::string(name);
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef __SSE4_2__
  need("sse4.2", __builtin_cpu_supports("sse4.2"));
#endif
#ifdef __AVX__
  need("avx", __builtin_cpu_supports("avx"));
#endif
#ifdef __AVX2__
  need("avx2", __builtin_cpu_supports("avx2"));
#endif
#ifdef __FMA__
  need("fma", __builtin_cpu_supports("fma"));
#endif
#ifdef __BMI2__
  need("bmi2", __builtin_cpu_supports("bmi2"));
#endif
#ifdef __AVX512F__
  need("avx512f", __builtin_cpu_supports("avx512f"));
#endif
#ifdef __AVX512DQ__
  need("avx512dq", __builtin_cpu_supports("avx512dq"));
#endif
#ifdef __AVX512BW__
  need("avx512bw", __builtin_cpu_supports("avx512bw"));
#endif
#ifdef __AVX512VL__
  need("avx512vl", __builtin_cpu_supports("avx512vl"));
#endif
#ifdef __AVX512VNNI__
  need("avx512vnni", __builtin_cpu_supports("avx512vnni"));
#endif
#ifdef __AVX512VBMI__
  need("avx512vbmi", __builtin_cpu_supports("avx512vbmi"));
#endif
#ifdef __AVX512BF16__
  need("avx512bf16", __builtin_cpu_supports("avx512bf16"));
#endif
#endif
  return missing;
}

}  // namespace dstrain
