// available_memory_bytes(): the smaller of what the system has free and what the container allows.
#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

#include "core/backend/cpu_backend.h"

namespace dstrain {
namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

int64_t system_available() {
  std::ifstream file("/proc/meminfo");
  for (std::string key, unit; file >> key;) {
    int64_t kib = 0;
    if (!(file >> kib)) break;
    std::getline(file, unit);
    if (key == "MemAvailable:") return kib * 1024;
  }
  return kUnknown;
}

// Version 2 of control groups, as containers mount it; "max" means no limit.
int64_t container_available() {
  std::ifstream limit_file("/sys/fs/cgroup/memory.max"), used_file("/sys/fs/cgroup/memory.current");
  int64_t limit = 0, used = 0;
  if (!(limit_file >> limit) || !(used_file >> used)) return kUnknown;
  return std::max<int64_t>(0, limit - used);
}

}  // namespace

int64_t available_memory_bytes() {
  const int64_t bytes = std::min(system_available(), container_available());
  return bytes == kUnknown ? 0 : bytes;
}

}  // namespace dstrain
