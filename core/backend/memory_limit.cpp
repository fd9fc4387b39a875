#include "core/backend/memory_limit.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>

#include "core/backend/cpu_backend.h"
#include "core/base/file.h"

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

// Where a version of control groups has its numbers.
struct Files {
  const char *limit, *used, *droppable;  // the last is a line of memory.stat
};
constexpr Files kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                             "total_inactive_file"};
constexpr Files kVersion2 = {"memory.max", "memory.current", "inactive_file"};

// Of one group. "max" is no number and means no limit.
int64_t available_in(const std::string& folder, const Files& files) {
  std::ifstream limit_file(join_path(folder, files.limit)),
      used_file(join_path(folder, files.used));
  int64_t limit = 0, used = 0, droppable = 0;
  if (!(limit_file >> limit) || !(used_file >> used)) return kUnknown;
  std::ifstream statistics(join_path(folder, "memory.stat"));
  int64_t bytes = 0;
  for (std::string key; statistics >> key >> bytes;)
    if (key == files.droppable) droppable = bytes;
  return std::max<int64_t>(0, limit - std::max<int64_t>(0, used - droppable));
}

// Of a group and those above it. In a container the mounted root may be the process's own group,
// and `group` a path of the host.
int64_t available_up_from(std::string group, const std::string& root, const Files& files) {
  int64_t available = available_in(root, files);
  while (group.size() > 1 && group.find("/..") == group.npos) {
    available = std::min(available, available_in(root + group, files));
    group = parent_folder(group);
  }
  return available;
}

}  // namespace

int64_t control_group_available_bytes(const std::string& groups, const std::string& mount) {
  int64_t available = kUnknown;
  std::istringstream lines(groups);
  for (std::string line; std::getline(lines, line);) {  // "4:memory:/path", "0::/path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == line.npos || second == line.npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string group = line.substr(second + 1);
    if (controllers == ",,")
      available = std::min(available, available_up_from(group, mount, kVersion2));
    else if (controllers.find(",memory,") != controllers.npos)
      available =
          std::min(available, available_up_from(group, join_path(mount, "memory"), kVersion1));
  }
  return available;
}

int64_t available_memory_bytes() {
  std::ifstream file("/proc/self/cgroup");
  const std::string groups{std::istreambuf_iterator<char>(file), {}};
  const int64_t bytes =
      std::min(system_available(), control_group_available_bytes(groups, "/sys/fs/cgroup"));
  return bytes == kUnknown ? 0 : bytes;
}

}  // namespace dstrain
